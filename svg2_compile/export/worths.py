"""What a saved program asks about the sizes of a call (``passes.worth.Worth``), as JSON.

Sizes are written as numbers, or as ``sympy.srepr`` writes expressions; they are checked before sympy reads them. The
device is asked for its profile where the file is loaded, and min_tokens is that of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from svg2_compile.export.errors import FileDamaged
from svg2_compile.export.serde import expression_from_text
from svg2_compile.passes.cost_model import CostInputs
from svg2_compile.passes.device_profile import profile_for
from svg2_compile.passes.graph.sizes import input_sizes
from svg2_compile.passes.worth import Worth

__all__ = ["describe_worths", "read_worths"]


def describe_worths(worths: Iterable[Worth]) -> list[dict[str, Any]]:
    """For the manifest."""
    return [
        {name: sympy.srepr(size) if isinstance(size, sympy.Expr) else size for name, size in vars(worth.cost).items()}
        for worth in worths
    ]


def read_worths(
    data: Sequence[Mapping[str, Any]], min_tokens: int | str, device: torch.device, program: ExportedProgram
) -> tuple[Worth, ...]:
    """What :func:`describe_worths` wrote, in the symbols of ``program``.

    Raises:
        FileDamaged: a size is missing, or is of a symbol that no input of the program tells.
        ExportError: a size is no expression over sizes.
    """
    # One name is one symbol, whatever is assumed of it.
    symbols = {symbol.name: symbol for symbol in input_sizes(program.graph)}
    names = {item.name for item in fields(CostInputs)}
    worths = []
    for entry in data:
        sizes = {name: _size(value, symbols) for name, value in entry.items() if name in names}
        worths.append(Worth(CostInputs(**sizes), min_tokens, profile_for(device)))
    return tuple(worths)


def _size(value: Any, symbols: Mapping[str, sympy.Symbol]) -> Any:
    if not isinstance(value, str):
        return value
    size = expression_from_text(value)
    unknown = sorted(symbol.name for symbol in size.free_symbols if symbol.name not in symbols)
    if unknown:
        raise FileDamaged(f"file: it decides by the sizes {', '.join(unknown)}, which no input of its graph has.")
    return size.xreplace({symbol: symbols[symbol.name] for symbol in size.free_symbols})
