"""diffusers' attention backend "svg2", for models that cannot be compiled.

from svg2_compile.integrations.diffusers import register_backend

register_backend(density=0.1)
pipe.transformer.set_attention_backend("svg2")
"""

from __future__ import annotations

from svg2_compile.integrations.diffusers.backend import NAME, register_backend
from svg2_compile.integrations.diffusers.registry import BackendUnsupported

__all__ = ["NAME", "BackendUnsupported", "register_backend"]
