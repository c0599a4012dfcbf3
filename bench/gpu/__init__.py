"""Rewritten attention on a GPU: correctness gate, speed against dense attention and other libraries, one whole model.

``python -m bench.gpu`` runs everything (see ``__main__.py``); ``python -m bench.gpu --rehearse`` runs the same code
with tiny shapes on the CPU.
"""
