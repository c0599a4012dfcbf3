"""The values that the symbolic sizes of a graph have in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from svg2_compile.passes.graph.sizes import solve_for_symbol
from svg2_compile.passes.graph.values import metadata_key

__all__ = ["SymbolBinder"]


class SymbolBinder:
    """Evaluates the sympy shapes of a graph's state for the inputs of one call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        # Symbol -> position of an input, axis of it (None: the input is a number), and factor and offset of its extent.
        self._where: dict[sympy.Symbol, tuple[int, int | None, int, int]] = {}
        key = metadata_key(gm.graph)
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = node.meta.get(key)
            if isinstance(value, torch.SymInt):
                self._bind(value, position, None)
            elif isinstance(value, torch.Tensor):
                for dim, extent in enumerate(value.shape):
                    if isinstance(extent, torch.SymInt):
                        self._bind(extent, position, dim)

    def _bind(self, value: torch.SymInt, position: int, dim: int | None) -> None:
        solved = solve_for_symbol(value.node.expr)
        if solved is not None:
            symbol, factor, offset = solved
            self._where.setdefault(symbol, (position, dim, factor, offset))

    def values(self, args: Sequence[Any]) -> dict[sympy.Symbol, sympy.Integer]:
        """Every symbol of the inputs with its value in ``args``."""
        return {symbol: sympy.Integer(self._read(symbol, args)) for symbol in self._where}

    def shapes(self, shapes: Sequence[tuple[Any, ...]], args: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """``shapes`` with every expression evaluated for the inputs ``args``."""
        symbols: set[sympy.Symbol] = set()
        for shape in shapes:
            for extent in shape:
                symbols |= getattr(extent, "free_symbols", set())
        values = {symbol: sympy.Integer(self._read(symbol, args)) for symbol in symbols}
        return tuple(tuple(_evaluate(extent, values) for extent in shape) for shape in shapes)

    def _read(self, symbol: sympy.Symbol, args: Sequence[Any]) -> int:
        position, dim, factor, offset = self._where[symbol]
        extent = int(args[position] if dim is None else args[position].shape[dim])
        return (extent - offset) // factor


def _evaluate(extent: Any, values: dict[sympy.Symbol, sympy.Integer]) -> int:
    return int(extent) if isinstance(extent, int) else int(extent.xreplace(values))
