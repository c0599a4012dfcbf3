"""Insert what a rewritten attention needs of tokens that were picked by their places.

    places [T] in [B * N], ascending;  starts = [0, 5, 9]: where the tokens of each of B rows begin

Tokens are put where they were picked, the rest of a row is masked, and the places are picked from the result again.
That the starts are those of the places is asked on the device, without a read by the host. Where they are not, the
operator that was there gets the starts that came, and its result is the result: no assumption about data is left.
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

__all__ = ["Places", "emit_picked", "emit_places", "emit_put"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Places:
    """holds: bool [], whether the starts are those of the places. places: int64 [T], all of them within the rows.
    attended: bool [B, N], what was picked. dense_share: float32 [B, 1], 1 where the operator computes all.
    total: B * N."""

    holds: fx.Node
    places: fx.Node
    attended: fx.Node
    dense_share: fx.Node
    total: Any


def emit_places(build: GraphBuilder, call: AttentionCall, tokens: Any, total: Any, last: Any) -> Places:
    """Insert nodes that check and prepare the places of ``call`` in rows of ``tokens`` tokens; ``last`` is the last
    place of ``total``."""
    assert call.picked is not None and call.starts is not None
    device = build.value(call.query).device
    given = build.call(_aten.to.dtype, call.picked.places, torch.int64)
    places = build.call(_aten.clamp.default, build.call(_aten.clamp.default, given, 0), None, last)
    rows = build.call(_aten.arange.default, call.sequences + 1, device=device)
    ends = build.call(_aten.mul.Tensor, rows, tokens)
    bounds = build.call(_aten.searchsorted.Tensor, given, ends, name="starts_of_places")
    later, earlier = (build.call(_aten.slice.Tensor, given, 0, *cut) for cut in ((1,), (0, -1)))
    conditions = [build.call(_aten.eq.Tensor, starts, bounds) for starts in dict.fromkeys(call.starts)]
    conditions.append(build.call(_aten.gt.Tensor, later, earlier))
    conditions.append(build.call(_aten.eq.Tensor, given, places))
    every = [build.call(_aten.all.default, condition) for condition in conditions]
    holds = functools.reduce(lambda one, other: build.call(_aten.logical_and.default, one, other), every)
    nothing = build.call(_aten.zeros.default, [total], dtype=torch.bool, device=device)
    attended = build.call(_aten.index_fill.int_Scalar, nothing, 0, places, True)
    attended = build.call(_aten.unflatten.int, attended, 0, [call.sequences, -1], name="picked")
    share = build.call(_aten.to.dtype, build.call(_aten.logical_not.default, holds), torch.float32)
    share = build.call(_aten.expand.default, share, [call.sequences, 1], name="dense_share")
    return Places(holds, places, attended, share, total)


def emit_put(build: GraphBuilder, places: Places, tokens: fx.Node) -> fx.Node:
    """Insert nodes that yield ``tokens`` [T, H, D] where they were picked, [B * N, H, D]; zeros elsewhere."""
    shape = [places.total, *(build.size(tokens, dim) for dim in (1, 2))]
    zeros = build.call(_aten.new_zeros.default, tokens, shape)
    return build.call(_aten.index_copy.default, zeros, 0, places.places, tokens)


def emit_picked(build: GraphBuilder, call: AttentionCall, places: Places, out: fx.Node) -> fx.Node:
    """Insert nodes that pick the places from ``out`` [B * N, H, D], or yield the result of the operator itself."""
    assert call.starts is not None
    picked = build.call(_aten.index_select.default, out, 0, places.places)
    source = call.source if call.source is not None else call.node
    starts: dict[fx.Node, Any] = {
        given: build.call(_aten.masked_fill.Scalar, given, places.holds, 0, name="starts_if_others")
        for given in dict.fromkeys(call.starts)
    }
    args, kwargs = fx.map_arg((source.args, source.kwargs), lambda node: starts.get(node, node))
    assert callable(source.target)
    other = build.call(source.target, *args, name="if_others", **kwargs)
    if not isinstance(node_value(other), torch.Tensor):
        other = build.unpack(other, ["if_others_out"])[0]
    return build.call(_aten.where.self, places.holds, picked, other)
