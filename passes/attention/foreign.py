"""Read a call of another library's attention (the table is in passes/graph/foreign_attention.py).

    flash_attn_varlen_func(q, k, v, starts, starts, ...)
        starts = [0, N], or [0, N, 2N] ...     ->  sequences of one length
        starts = two numbers that are data     ->  one sequence, and padding behind it
        anything else                          ->  "several_sequences"

Causal and dropout go on to the decision, which names them; windows, soft caps, slopes and the like are not understood.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
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

__all__ = ["read_foreign_attention"]


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
    sequences, ends = (1, None) if call.layout != "nhd" else _sequences(call, numbers)
    if sequences is None:
        detail = (
            f"{call.name}: several sequences in one row, whose lengths are not known to be equal. Sequences of one "
            "length, or one alone, can become sparse: leave out text that is padding, or exclude it by a mask"
        )
        return UnreadableAttention(node, name, "several_sequences", detail)
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
        sequences=sequences,
        source=node if node is not output else None,
        ends=ends,
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


def _sequences(call: ForeignAttention, numbers: Numbers) -> tuple[int | None, fx.Node | None]:
    """How many sequences of one length there are, None if they differ; and where a single one ends, if that is data."""
    assert call.starts is not None
    pairs = zip(call.starts, (call.query, call.key), strict=True)
    counts = [_count(starts, tensor, numbers) for starts, tensor in pairs]
    if None not in counts:
        return (counts[0], None) if counts[0] == counts[1] else (None, None)
    single = all(shape_of(starts) == (2,) for starts in call.starts)
    return (1, call.starts[1]) if single else (None, None)


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
