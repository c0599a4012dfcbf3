"""The specification: every op in plain PyTorch, readable before fast. ``implementation.py`` lists the ops."""
