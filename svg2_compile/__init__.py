"""svg2_compile: a compiler that makes the attention of video diffusion transformers sparse.

    torch.compile(model, backend="svg2")        one line, any model
    svg2_compile.enable(pipe)                   a whole diffusers pipeline, steps told by its scheduler
    svg2_compile.explain(model, **inputs)       what would become sparse, and why not the rest

The names below are loaded when they are first used, so that importing a part (``svg2_compile.kernels``) does not
import the whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg2_compile.api import Enabled, disable, enable, report, reset
    from svg2_compile.config import ConfigError, Svg2Config
    from svg2_compile.explanation import explain
    from svg2_compile.reports import Report

__all__ = [
    "ConfigError",
    "Enabled",
    "Report",
    "Svg2Config",
    "disable",
    "enable",
    "explain",
    "report",
    "reset",
]

_HOME = {
    "ConfigError": "svg2_compile.config",
    "Enabled": "svg2_compile.api",
    "Report": "svg2_compile.reports",
    "Svg2Config": "svg2_compile.config",
    "disable": "svg2_compile.api",
    "enable": "svg2_compile.api",
    "explain": "svg2_compile.explanation",
    "report": "svg2_compile.api",
    "reset": "svg2_compile.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
