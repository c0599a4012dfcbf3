"""Symbolic sizes: as plain ints where they are known, solved for their symbol, and as nodes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from svg2_compile.passes.graph.values import node_value

__all__ = ["InputSize", "SizeEmitter", "input_sizes", "plain_size", "size_hints", "solve_for_symbol", "traced_sizes"]


class InputSize(NamedTuple):
    """Where a symbol is read: it is (extent - offset) / factor of an axis of an input, or of an input that is a number
    (dim None)."""

    position: int
    dim: int | None
    factor: int
    offset: int


def input_sizes(graph: fx.Graph) -> dict[sympy.Symbol, InputSize]:
    """Every symbol that the sizes of the graph's inputs tell."""
    found: dict[sympy.Symbol, InputSize] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node_value(node)
        extents: list[tuple[int | None, Any]] = [(None, value)]
        if isinstance(value, torch.Tensor):
            extents = list(enumerate(value.shape))
        for dim, extent in extents:
            solved = solve_for_symbol(extent.node.expr) if is_symbolic(extent) else None
            if solved is not None:
                symbol, factor, offset = solved
                found.setdefault(symbol, InputSize(position, dim, factor, offset))
    return found


def is_symbolic(size: Any) -> TypeGuard[torch.SymInt]:
    """Whether a size has an expression. The ragged one of a nested tensor has none."""
    return isinstance(size, torch.SymInt) and not size.node.is_nested_int()


def traced_sizes(shape_env: ShapeEnv | None) -> dict[sympy.Symbol, Any]:
    """The number that every symbol was traced with; those that depend on data are not among them."""
    return {} if shape_env is None else dict(size_hints(shape_env))


def size_hints(shape_env: ShapeEnv) -> dict[sympy.Symbol, Any]:
    """The same as the shape environment itself keeps it, to be changed there."""
    # Named var_to_val before torch 2.13.
    hints: Any = shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val
    return hints


def plain_size(size: Any) -> Any:
    """An int where a size is known, else the expression."""
    return int(size) if isinstance(size, int) or size.is_Integer else size


def solve_for_symbol(extent: sympy.Expr) -> tuple[sympy.Symbol, int, int] | None:
    """``(symbol, factor, offset)`` of an extent ``factor * symbol + offset``; None if it is something else.

    A dimension that torch.export was told to be ``2 * n`` has the extent 2*s0, and no other value may have the size s0.
    """
    if len(extent.free_symbols) != 1:
        return None
    (symbol,) = extent.free_symbols
    factor = extent.coeff(symbol, 1)
    offset = extent - factor * symbol
    if not (factor.is_Integer and offset.is_Integer and factor > 0):
        return None
    return symbol, int(factor), int(offset)


class SizeEmitter:
    """Turns token counts (ints, or sympy expressions over the sizes of a graph's values) into graph arguments.

    Args:
        graph: symbols are read from its SymInt nodes or, failing that, from the shapes of its tensors.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        # Where a symbol is read, and how it is computed from what is read there.
        self._symbols: dict[sympy.Symbol, tuple[fx.Node, int | None]] = {}
        self._linear: dict[sympy.Symbol, tuple[fx.Node, int, int, int]] = {}
        for node in graph.nodes:
            self._learn(node)

    def emit(self, size: int | sympy.Expr, before: fx.Node) -> int | fx.Node:
        """``size`` as an argument for a node in front of ``before``.

        Raises:
            ValueError: the expression has a symbol that no value of the graph in front of ``before`` has.
        """
        if isinstance(size, int):
            return size
        if size.is_Integer:
            return int(size)
        with self._graph.inserting_before(before):
            tracer = fx.proxy.GraphAppendingTracer(self._graph)
            environment = {
                symbol: fx.Proxy(self._symbol_node(symbol), tracer)
                for symbol in sorted(size.free_symbols, key=lambda symbol: symbol.name)
            }
            marker = set(self._graph.nodes)
            result = sympy_interp(PythonReferenceAnalysis, environment, size)
            self._annotate(marker)
        assert isinstance(result, fx.Proxy)
        return result.node

    def _learn(self, node: fx.Node) -> None:
        value = node_value(node)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            self._symbols.setdefault(value.node.expr, (node, None))
        elif isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if not is_symbolic(extent):
                    continue
                if isinstance(extent.node.expr, sympy.Symbol):
                    self._symbols.setdefault(extent.node.expr, (node, dim))
                elif (solved := solve_for_symbol(extent.node.expr)) is not None:
                    symbol, factor, offset = solved
                    self._linear.setdefault(symbol, (node, dim, factor, offset))

    def _symbol_node(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol in self._symbols:
            node, dim = self._symbols[symbol]
            return node if dim is None else self._call(torch.ops.aten.sym_size.int, node, dim)
        if symbol not in self._linear:
            raise ValueError(f"no value of the graph has the size {symbol}")
        node, dim, factor, offset = self._linear[symbol]
        size = self._call(torch.ops.aten.sym_size.int, node, dim)
        return self._call(operator.floordiv, self._call(operator.sub, size, offset), factor)

    def _call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self._graph.call_function(target, args)
        self._evaluate(node)
        return node

    def _annotate(self, known: set[fx.Node]) -> None:
        for node in self._graph.nodes:
            if node not in known:
                self._evaluate(node)

    def _evaluate(self, node: fx.Node) -> None:
        """Give a new node the fake value that it has on its arguments' fake values."""
        key = "val" if any("val" in n.meta for n in node.all_input_nodes) else "example_value"
        args, kwargs = fx.map_arg((node.args, node.kwargs), node_value)
        target = node.target
        assert callable(target)
        node.meta[key] = target(*args, **kwargs)
