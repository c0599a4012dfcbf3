"""What is said while a model compiles and runs: the logger, each thing once, graph dumps."""
