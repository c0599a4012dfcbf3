"""Small helpers over FX graphs: arguments by name, module paths, symbolic sizes as nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from svg2_compile.passes.graph.values import node_value

__all__ = [
    "SizeEmitter",
    "bind_arguments",
    "is_bool",
    "module_path",
    "operator_name",
    "shape_of",
    "solve_for_symbol",
    "users_of",
]


def operator_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "softmax" for torch.softmax, aten.softmax.int and Tensor.softmax alike."""
    target = node.target
    if isinstance(target, str):
        return target if node.op == "call_method" else ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", "")


def bind_arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a call by name, whether given by position or by keyword. Those not given are missing.

    Operators of a library bring their schema; ``names`` are the positional names of everything else.
    """
    if isinstance(node.target, torch._ops.OpOverload):
        names = tuple(argument.name for argument in node.target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape of the tensor that a node yields (ints and SymInts); None if it yields no tensor."""
    value = node_value(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def is_bool(node: fx.Node) -> bool:
    """Whether a node yields a bool tensor."""
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def users_of(node: fx.Node) -> set[fx.Node]:
    """The nodes that use the value of a node; torch.export's assertions about its metadata do not count."""
    return {user for user in node.users if operator_name(user) != "_assert_tensor_metadata"}


_INDEX = re.compile(r"\[['\"]?(\w+)['\"]?\]")


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced in, such as "blocks.3.attn1"; the node's name if there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return node.name
    path = entries[-1][0] if isinstance(entries[-1], tuple) else str(entries[-1])
    # Dynamo writes how it got at the module: L['self'].__dict__['_modules']['blocks'].0.attn1, L['fn'].__self__ ...
    path = re.sub(r"^L\[['\"]\w+['\"]\]", "", path)
    path = path.replace("__self__", "").replace("__dict__['_modules']", "").replace("_modules", "")
    path = _INDEX.sub(r".\1", path)
    parts = [part for part in path.split(".") if part]
    return ".".join(parts) or node.name


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
                if not isinstance(extent, torch.SymInt):
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
