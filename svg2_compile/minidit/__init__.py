"""A small trained video diffusion transformer: diffusers' Wan transformer on the pixels of synthetic video.

``prompts`` is its language, ``model`` loads it and samples from it. Needs the extra ``diffusers``. How it was trained:
``bench/minidit``.
"""
