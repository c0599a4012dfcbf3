"""Rows that are picked by their places and put back there: flash-attn's unpad_input and pad_input.

    places = nonzero(mask [B, N])                     [T] places in [B * N]
    packed = x [B * N, ...][places]                   pick: the token axis is marked with what it was (marks.py)
    ... whatever keeps positions ...
    zeros [B * N, ...][places] = packed               put: the token axis is what it was

Where the places are others than those that were picked, nothing is put back, and the axis is a mixture as before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.graph.nodes import operator_name, shape_of
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.axes import MIXED, Axes, Axis, add_sources, blended_sources, single
from svg2_compile.passes.layout.lengths import same_length, size_expr
from svg2_compile.passes.layout.marks import Picked, picks_of
from svg2_compile.passes.layout.op_call import is_constant

__all__ = ["axes_of_moved_rows", "pick_of"]

AxesOf = Callable[[fx.Node], Axes]


def axes_of_moved_rows(node: fx.Node, axes_of: AxesOf) -> Axes | None:
    """The axes behind a node that picks rows by their places, or puts them back; None where it does anything else.

    `axes_of`: the axes of its inputs, before it ran.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    pick = _read_pick(node)
    if pick is not None:
        return _picked(pick, shape_of(node), axes_of)
    put = _read_put(node)
    return None if put is None else _put_back(put, axes_of)


def pick_of(axis: Axis) -> Picked | None:
    """The only mark on an axis of as many positions as were picked; None where there is none or more than one."""
    marks = picks_of(axis.sources) if len(axis.factors or ()) == 1 else []
    shape = shape_of(marks[0].places) if len(marks) == 1 else None
    if shape is None or axis.length is None or not same_length(size_expr(shape[0]), axis.length):
        return None
    return marks[0]


def _picked(move: _Move, shape: Any, axes_of: AxesOf) -> Axes | None:
    first, *others = axes_of(move.source)
    sources = blended_sources(first)
    source_shape = shape_of(move.source) or ()
    if sources is None or MIXED in first.sources or shape is None or len(shape) != len(source_shape):
        return None
    if not all(_same(size, own) for size, own in zip(shape[1:], source_shape[1:], strict=True)):
        return None
    places = axes_of(move.places)[0].sources - set(picks_of(axes_of(move.places)[0].sources))
    return (single(sources | places | {Picked.of(first, move.places)}, shape[0]), *others)


def _put_back(move: _Move, axes_of: AxesOf) -> Axes | None:
    assert move.values is not None
    own, values = axes_of(move.source), axes_of(move.values)
    mark = pick_of(values[0]) if values else None
    if mark is None or mark.places is not move.places or not is_constant(own) or len(own) != len(values):
        return None
    lengths = own[0].length, mark.axis.length
    if lengths[0] is None or lengths[1] is None or not same_length(lengths[0], lengths[1]):
        return None
    shapes = zip((shape_of(move.source) or ())[1:], (shape_of(move.values) or ())[1:], strict=True)
    if not all(_same(size, other) for size, other in shapes):
        return None
    added = values[0].sources - (blended_sources(mark.axis) or frozenset()) - {mark, MIXED}
    return (add_sources(mark.axis, added), *values[1:])


def _same(size: Any, other: Any) -> bool:
    return same_length(size_expr(size), size_expr(other))


@dataclass(frozen=True)
class _Move:
    """Rows of axis 0 of `source` at `places`, an integer tensor of one axis; `values` are put there."""

    source: fx.Node
    places: fx.Node
    values: fx.Node | None = None


def _read_pick(node: fx.Node) -> _Move | None:
    """The rows that a node picks; None where it does anything else."""
    name, arguments = operator_name(node), _arguments(node, ("input", "dim", "index"))
    if node.target is operator.getitem:
        return _move(node.args[0], _only(node.args[1]))
    if name in ("gather", "index_select") and arguments.get("dim") == 0:
        return _move(arguments["input"], arguments.get("index"))
    return None


def _read_put(node: fx.Node) -> _Move | None:
    """The rows that a node overwrites, in place or in a copy; None where it does anything else."""
    name = operator_name(node).removesuffix("_")
    if node.target is operator.setitem:
        return _move(node.args[0], _only(node.args[1]), node.args[2])
    if name in ("scatter", "index_copy"):
        arguments = _arguments(node, ("input", "dim", "index", "src"))
        values = arguments.get("src", arguments.get("source"))
        return _move(arguments["input"], arguments.get("index"), values) if arguments.get("dim") == 0 else None
    if name == "index_put":
        arguments = _arguments(node, ("input", "indices", "values"))
        return _move(arguments["input"], _only(arguments.get("indices")), arguments.get("values"))
    return None


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    found = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {"input": found.pop("self", None), **found}


def _only(index: Any) -> Any:
    return index[0] if isinstance(index, (tuple, list)) and len(index) == 1 else index


def _move(source: Any, index: Any, values: Any = None) -> _Move | None:
    if not isinstance(source, fx.Node) or not isinstance(index, fx.Node) or shape_of(source) is None:
        return None
    places = _rows_of(index)
    return None if places is None else _Move(source, places, values if isinstance(values, fx.Node) else None)


def _rows_of(index: fx.Node) -> fx.Node | None:
    """The integer tensor [T] of which an index [T] or [T, D] has a row for every position; None if it is no such."""
    is_column = len(shape_of(index) or ()) == 1
    for _ in range(8):
        value, shape = node_value(index), shape_of(index) or ()
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
            return None
        if len(shape) == 1 and is_column:
            return index
        source, name = index.args[0] if index.args else None, operator_name(index)
        if len(shape) != 2 or not isinstance(source, fx.Node):
            return None
        if name == "repeat" and isinstance(index.args[1], str):  # of einops: "z -> z d"
            before, _, after = index.args[1].partition("->")
            is_column = before.split() == after.split()[:1]
        elif name in ("expand", "repeat"):
            is_column = _is_one((shape_of(source) or (0,))[-1]) and len(shape_of(source) or ()) == 2
        elif len(shape_of(source) or ()) == 1:
            is_column = _is_one(shape[1])
        if not is_column:
            return None
        index = source
    return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
