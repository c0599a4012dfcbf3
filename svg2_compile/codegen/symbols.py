"""The values that the symbolic sizes of a graph have in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from svg2_compile.passes.graph.sizes import input_sizes

__all__ = ["SymbolBinder"]


class SymbolBinder:
    """Evaluates the sympy shapes of a graph's state for the inputs of one call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._where = input_sizes(gm.graph)

    def values(self, args: Sequence[Any]) -> dict[sympy.Symbol, sympy.Integer]:
        """Every symbol of the inputs with its value in ``args``."""
        return {symbol: sympy.Integer(self.read(symbol, args)) for symbol in self._where}

    def shapes(self, shapes: Sequence[tuple[Any, ...]], args: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """``shapes`` with every expression evaluated for the inputs ``args``."""
        symbols: set[sympy.Symbol] = set()
        for shape in shapes:
            for extent in shape:
                symbols |= getattr(extent, "free_symbols", set())
        values = {symbol: sympy.Integer(self.read(symbol, args)) for symbol in symbols}
        return tuple(tuple(_evaluate(extent, values) for extent in shape) for shape in shapes)

    def read(self, symbol: sympy.Symbol, args: Sequence[Any]) -> int:
        """The value of one symbol of the inputs in ``args``."""
        position, dim, factor, offset = self._where[symbol]
        extent = int(args[position] if dim is None else args[position].shape[dim])
        return (extent - offset) // factor


def _evaluate(extent: Any, values: dict[sympy.Symbol, sympy.Integer]) -> int:
    return int(extent) if isinstance(extent, int) else int(extent.xreplace(values))
