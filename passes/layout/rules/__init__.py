"""What every ATen operator does to axes, one file for each kind of operator. The face is table.py."""
