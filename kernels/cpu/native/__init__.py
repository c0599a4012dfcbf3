"""Native code for the CPU: C++ with one parallel region for each op, compiled at first use.

``implementation.py`` lists the ops; those without native code are the ATen ones of ``kernels.cpu``.
"""
