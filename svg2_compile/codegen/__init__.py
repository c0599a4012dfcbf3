"""From graphs to functions: the inner backend, graphs compiled when they are needed, the values of symbolic sizes."""
