"""Insert what a rewritten attention needs of rows that hold two sequences, the second of which is padding.

    row 0                row 1                  starts = [0, 100, 128, 220, 256]: data, as are their lengths
    [video, text | pad ] [video, text    | pad]

The first sequences become sparse. What lies behind them is attended by the operator that was there, on the same
tensors, with starts of which only one sequence is not empty: padding attends to padding, bit for bit as before.
That the rows lie so is asked of the starts on the device, without a read by the host. Where they do not, the operator
gets the starts that came, and its result is the result: no assumption about data is left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.call import AttentionCall
from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.graph.values import node_value

__all__ = ["Rows", "emit_rest", "emit_rows"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """holds: bool [], whether the starts are as expected. attended: bool [rows, N], the tokens of first sequences.
    dense_share: float32 [rows, 1], how much of the scores of a row is computed by the operator."""

    holds: fx.Node
    attended: fx.Node
    dense_share: fx.Node


def emit_rows(build: GraphBuilder, call: AttentionCall, tokens: Any) -> Rows:
    """Insert nodes that find the first sequence of each of ``call.sequences`` rows of ``tokens`` tokens."""
    assert call.parted is not None
    queries, keys = call.parted
    rows = call.sequences
    device = build.value(queries).device
    begins = build.call(_aten.slice.Tensor, queries, 0, 0, 2 * rows, 2)
    ends = build.call(_aten.slice.Tensor, queries, 0, 1, 2 * rows, 2)
    count = build.call(_aten.arange.default, rows + 1, device=device)
    places = build.call(_aten.mul.Tensor, count, tokens)
    bounds = build.call(_aten.slice.Tensor, queries, 0, 0, 2 * rows + 1, 2)
    lengths = build.call(_aten.sub.Tensor, ends, begins, name="first_lengths")
    conditions = [
        build.call(_aten.eq.Tensor, bounds, places),
        build.call(_aten.ge.Scalar, lengths, 0),
        build.call(_aten.le.Scalar, lengths, tokens),
    ]
    if keys is not queries:
        conditions.append(build.call(_aten.eq.Tensor, queries, keys))
    every = [build.call(_aten.all.default, condition) for condition in conditions]
    holds = functools.reduce(lambda one, other: build.call(_aten.logical_and.default, one, other), every)
    positions = build.call(_aten.arange.default, tokens, device=device)
    lengths = build.call(_aten.unsqueeze.default, lengths, 1)
    attended = build.call(_aten.lt.Tensor, positions, lengths, name="in_first_sequence")
    return Rows(holds, attended, _dense_share(build, holds, lengths, tokens))


def _dense_share(build: GraphBuilder, holds: fx.Node, lengths: fx.Node, tokens: Any) -> fx.Node:
    first = build.call(_aten.to.dtype, lengths, torch.float32)
    rest = build.call(_aten.rsub.Scalar, first, tokens)
    first, rest = (build.call(_aten.square.default, count) for count in (first, rest))
    share = build.call(_aten.div.Tensor, rest, build.call(_aten.add.Tensor, first, rest))
    return build.call(_aten.where.ScalarOther, holds, share, 1.0, name="dense_share")


def emit_rest(build: GraphBuilder, call: AttentionCall, rows: Rows, out: fx.Node) -> fx.Node:
    """Insert nodes that yield ``out`` [rows * N, H, D] with the result of the operator itself for all other tokens."""
    first = build.call(_aten.logical_and.default, rows.attended, rows.holds)
    rest = _behind_first(build, call, rows.holds, 0)
    for row in range(1, call.sequences):
        numbers = build.call(_aten.arange.default, call.sequences, device=build.value(first).device)
        here = build.call(_aten.unsqueeze.default, build.call(_aten.eq.Scalar, numbers, row), 1)
        here = build.call(_aten.logical_and.default, build.call(_aten.expand_as.default, here, first), rows.holds)
        rest = _where(build, here, _behind_first(build, call, rows.holds, row), rest)
    return _where(build, first, out, rest)


def _where(build: GraphBuilder, tokens: fx.Node, this: fx.Node, other: fx.Node) -> fx.Node:
    tokens = build.call(_aten.flatten.using_ints, tokens)
    for _ in range(2):
        tokens = build.call(_aten.unsqueeze.default, tokens, -1)
    return build.call(_aten.where.self, tokens, this, other)


def _behind_first(build: GraphBuilder, call: AttentionCall, holds: fx.Node, row: int) -> fx.Node:
    """The operator on the second sequence of a row alone. Where the rows are others: on all sequences for the first
    row, and on none for the rest.

    starts[1], starts[1], starts[2], starts[2], starts[2]      of row 0 of 2
    """
    assert call.parted is not None
    source = call.source if call.source is not None else call.node
    places = build.call(_aten.arange.default, 2 * call.sequences + 1, device=build.value(holds).device)
    behind = build.call(_aten.add.Scalar, build.call(_aten.ge.Scalar, places, 2 * row + 2), 2 * row + 1)
    others = places if row == 0 else build.call(_aten.zeros_like.default, places)
    chosen = build.call(_aten.where.self, holds, behind, others)
    starts: dict[fx.Node, Any] = {
        given: build.call(_aten.index_select.default, given, 0, chosen, name=f"starts_behind_{row}")
        for given in dict.fromkeys(call.parted)
    }
    args, kwargs = fx.map_arg((source.args, source.kwargs), lambda node: starts.get(node, node))
    assert callable(source.target)
    result = build.call(source.target, *args, name=f"rest_{row}", **kwargs)
    return result if isinstance(node_value(result), torch.Tensor) else build.unpack(result, [f"rest_out_{row}"])[0]
