"""A small video diffusion transformer, trained on synthetic video, to measure sparse attention on.

``prompts`` is its language, ``data`` makes its videos, ``model`` loads and samples it, ``train`` trains it.
"""
