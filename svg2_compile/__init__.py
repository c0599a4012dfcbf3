"""svg2_compile: a compiler that makes the attention of video diffusion transformers sparse.

    torch.compile(model, backend="svg2")        one line, any model
    svg2_compile.enable(pipe)                   a whole diffusers pipeline, steps told by its scheduler
    svg2_compile.denoising(step=7, ...)         says where the calls of a loop of your own stand
    svg2_compile.attention(query, key, ...)     one attention, for models that are not compiled
    svg2_compile.explain(model, **inputs)       what would become sparse, and why not the rest
    svg2_compile.compare_with_dense(pipe, ...)  what it costs in quality and gains in time, as a page
    svg2_compile.transform(exported_program)    the same rewrite of a torch.export program; save, load, package it

The names below are loaded when they are first used, so that importing a part (``svg2_compile.kernels``) does not
import the whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg2_compile.api import disable, enable, report, reset
    from svg2_compile.compare.paired import compare_with_dense
    from svg2_compile.eager import AttentionState, attention
    from svg2_compile.explanation import explain
    from svg2_compile.export.aoti import package
    from svg2_compile.export.errors import ExportError, FileDamaged
    from svg2_compile.export.file import load, save
    from svg2_compile.export.transform import transform
    from svg2_compile.export.transformed import TransformedProgram
    from svg2_compile.hosts.in_place import Enabled
    from svg2_compile.reporting.report import Report
    from svg2_compile.runtime.standing import denoising
    from svg2_compile.settings.config import ConfigError, Svg2Config

__all__ = [
    "AttentionState",
    "ConfigError",
    "Enabled",
    "ExportError",
    "FileDamaged",
    "Report",
    "Svg2Config",
    "TransformedProgram",
    "attention",
    "compare_with_dense",
    "denoising",
    "disable",
    "enable",
    "explain",
    "load",
    "package",
    "report",
    "reset",
    "save",
    "transform",
]

_HOME = {
    "AttentionState": "svg2_compile.eager",
    "ConfigError": "svg2_compile.settings.config",
    "Enabled": "svg2_compile.hosts.in_place",
    "ExportError": "svg2_compile.export.errors",
    "FileDamaged": "svg2_compile.export.errors",
    "Report": "svg2_compile.reporting.report",
    "Svg2Config": "svg2_compile.settings.config",
    "TransformedProgram": "svg2_compile.export.transformed",
    "attention": "svg2_compile.eager",
    "compare_with_dense": "svg2_compile.compare.paired",
    "denoising": "svg2_compile.runtime.standing",
    "disable": "svg2_compile.api",
    "enable": "svg2_compile.api",
    "explain": "svg2_compile.explanation",
    "load": "svg2_compile.export.file",
    "package": "svg2_compile.export.aoti",
    "report": "svg2_compile.api",
    "reset": "svg2_compile.api",
    "save": "svg2_compile.export.file",
    "transform": "svg2_compile.export.transform",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
