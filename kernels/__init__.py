"""The ``svg2::`` operators (``ops.py``), what they take, and what runs: a readable reference, the CPU's and the GPU's.

Nothing is imported here: the operators must load without Triton."""
