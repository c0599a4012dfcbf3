"""The fast CPU implementation of every op, in ATen calls. ``implementation.py`` lists the ops."""
