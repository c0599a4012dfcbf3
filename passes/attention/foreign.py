"""Read a call of another library's attention (the table is in passes/graph/foreign_attention.py).

    flash_attn_varlen_func(q, k, v, starts, starts, ...)
        starts = [0, N], or [0, N, 2N] ...     ->  sequences of one length
        starts = two numbers that are data     ->  one sequence, and padding behind it
        starts = 2 * rows + 1 that are data    ->  rows of a sequence, and one of padding behind it (see emit_rest.py)
        starts of any number that are data     ->  tokens picked from rows, if the layout shows it (see emit_picked.py)
        anything else                          ->  "several_sequences"

Causal and dropout go on to the decision, which names them; windows, soft caps, slopes and the like are not understood.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.graph.foreign_attention import ForeignAttention, read_foreign
from svg2_compile.passes.graph.known_numbers import linear_numbers
from svg2_compile.passes.graph.nodes import module_path, shape_of
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.lengths import same_length, size_expr

Numbers = Mapping[sympy.Symbol, Any]

__all__ = ["SEVERAL_SEQUENCES", "read_foreign_attention"]

SEVERAL_SEQUENCES = (
    "several sequences in one row, whose lengths are not known to be equal. Sequences of one length, one alone, one "
    "and its padding in every row, or what a mask picks from rows of one length can become sparse: leave out text that "
    "is padding, or exclude it by a mask"
)
"""The reason "several_sequences" in words."""


def read_foreign_attention(node: fx.Node, numbers: Numbers) -> AttentionCall | UnreadableAttention | None:
    """The attention that a node computes with another library; None if none. ``numbers``: of symbols, if known."""
    call = read_foreign(node, numbers)
    if call is None:
        return None
    name = module_path(node)
    if call.extra is not None:
        detail = f"{call.name} with {call.extra}: only softmax(scale * query @ key^T) @ value can become sparse"
        return UnreadableAttention(node, name, "unreadable", detail)
    output = _output(node)
    if output is None:
        detail = f"{call.name}: more than its output is used (the log-sum-exp of the attention)"
        return UnreadableAttention(node, name, "aux_outputs", detail)
    packing = _Packing(1) if call.layout != "nhd" else _packing(call, numbers)
    if packing is None:
        return UnreadableAttention(node, name, "several_sequences", f"{call.name}: {SEVERAL_SEQUENCES}")
    shape = shape_of(call.query) or ()
    return AttentionCall(
        node=output,
        query=call.query,
        key=call.key,
        value=call.value,
        attn_mask=call.bias,
        scale=call.scale,
        is_causal=call.is_causal,
        dropout_p=call.dropout_p,
        axes="gnd" if call.layout == "bnhd" and len(shape) == 3 else call.layout,
        form=call.name,
        name=name,
        sequences=packing.sequences,
        source=node if node is not output else None,
        ends=packing.ends,
        parted=packing.parted,
        starts=packing.starts,
        quantised=call.spelling.quantised,
    )


def _output(node: fx.Node) -> fx.Node | None:
    """The node of the attention's output; None where another output is used as well."""
    if isinstance(node_value(node), torch.Tensor):
        return node
    outputs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(outputs) != len(node.users) or any(index != 0 and user.users for index, user in outputs.items()):
        return None
    return outputs.get(0)


@dataclass(frozen=True)
class _Packing:
    """How rows are packed: fields of the AttentionCall."""

    sequences: int
    ends: fx.Node | None = None
    parted: tuple[fx.Node, fx.Node] | None = None
    starts: tuple[fx.Node, fx.Node] | None = None


def _packing(call: ForeignAttention, numbers: Numbers) -> _Packing | None:
    """Sequences of one length, or starts that are data: of one, of two in every row, or of what may have been picked
    from rows. None where it is anything else."""
    assert call.starts is not None
    pairs = list(zip(call.starts, (call.query, call.key), strict=True))
    counts = [_count(starts, tensor, numbers) for starts, tensor in pairs]
    if None not in counts:
        return _Packing(counts[0] or 1) if counts[0] == counts[1] else None
    sizes = {_length(starts, numbers) for starts in call.starts}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None or size < 2:
        return None
    if size == 2:
        return _Packing(1, ends=call.starts[1], starts=call.starts)
    rows = (size - 1) // 2
    if size % 2 == 1 and all(_may_be_rows(*pair, rows, numbers) for pair in pairs):
        return _Packing(rows, parted=call.starts, starts=call.starts)
    return _Packing(size - 1, starts=call.starts) if counts == [None, None] else None


def _length(starts: fx.Node, numbers: Numbers) -> int | None:
    shape = shape_of(starts) or ()
    size = size_expr(shape[0]).xreplace(dict(numbers)) if len(shape) == 1 else None
    return int(size) if size is not None and size.is_Integer else None


def _may_be_rows(starts: fx.Node, tensor: fx.Node, rows: int, numbers: Numbers) -> bool:
    """Whether every other start may be that of a row: it is asked again when the graph runs, unless it is known."""
    terms, shape = linear_numbers(starts), shape_of(tensor)
    if not isinstance(terms, list) or shape is None:
        return shape is not None
    total = size_expr(shape[0]).xreplace(dict(numbers))
    places = [_expression(place).xreplace(dict(numbers)) for place in terms]
    return all(same_length(place * rows, total * row) for row, place in enumerate(places[::2]))


def _count(starts: fx.Node, tensor: fx.Node, numbers: Numbers) -> int | None:
    """How many sequences of one length fill a tensor; None where that is not known."""
    terms, shape = linear_numbers(starts), shape_of(tensor)
    if not isinstance(terms, list) or len(terms) < 2 or shape is None:
        return None
    places = [_expression(place).xreplace(dict(numbers)) for place in terms]
    lengths = [after - before for before, after in itertools.pairwise(places)]
    fills = places[0] == 0 and same_length(places[-1], size_expr(shape[0]).xreplace(dict(numbers)))
    return len(lengths) if fills and all(same_length(length, lengths[0]) for length in lengths) else None


def _expression(terms: dict[fx.Node | None, int]) -> sympy.Expr:
    sizes: dict[Any, sympy.Expr] = {key: size_expr(1 if key is None else node_value(key)) for key in terms}
    return sympy.Add(*(sizes[key] * count for key, count in terms.items()))
