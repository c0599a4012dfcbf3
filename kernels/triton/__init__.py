"""Every op for GPUs, in Triton. ``implementation.py`` lists the ops; nothing is imported here."""
