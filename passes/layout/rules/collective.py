"""Token-layout rules of the functional collectives of torch.distributed.

Every rank of a group runs the same graph on its own shard, so that what is known of the axes of one rank's tensor holds
for those of the others. A collective puts the shards of all ranks side by side: one more outer factor, the *ranks*.

    all_gather      [tokens: 64]                                 ->  [ranks: 2 x tokens: 64]
    all_to_all      [heads: 2 x tokens: 64 x heads: 4]           ->  [ranks: 2 x tokens: 64 x heads: 4]
                    (the outer factor is what this rank gives away; it keeps one position of it)
    all_reduce      as it was

Ranks that hold shards of one axis are positions of that axis: `[ranks: 2 x video: 64]` is `[video: 128]`. Where a shard
holds several segments, the ranks carry nothing: `[ranks: 2 x (text: 4 | video: 16)]` is
`[text: 4 | video: 16 | text: 4 | video: 16]`. Where the shards are those of a concatenation (`Inside`), they are it.

Shards of different sizes (all_to_all with splits of its own) make the axis unknown.
"""

from __future__ import annotations

import sympy
import torch
from torch._ops import OpOverloadPacket

from svg2_compile.passes.graph.collectives import NAMESPACES
from svg2_compile.passes.layout.axes import (
    NO_SOURCES,
    ONE,
    UNKNOWN,
    Axes,
    Axis,
    Factor,
    Inside,
    Segment,
    factor_length,
    make_axis,
)
from svg2_compile.passes.layout.lengths import exact_quotient, same_length, size_expr
from svg2_compile.passes.layout.op_call import OpCall, RuleTable, sizes_of, unknown_axes
from svg2_compile.passes.layout.reshape import reshape


def gathered(call: OpCall) -> list[Axes]:
    """`all_gather_into_tensor`: the shards of all ranks, one after the other on the first axis."""
    axes = _axes_of_input(call)
    if not axes:
        return [unknown_axes(output) for output in call.outputs]
    return [(_with_ranks(_first_factor(axes), axes[0], size_expr(call.args["group_size"])), *axes[1:])]


def exchanged(call: OpCall) -> list[Axes]:
    """`all_to_all_single` in equal parts: of the first axis, one part from every rank."""
    axes, (output,) = _axes_of_input(call), call.outputs
    size = sizes_of(output)[0]
    parts = [size_expr(part) for name in ("input_split_sizes", "output_split_sizes") for part in call.args[name]]
    ranks = sympy.Integer(len(call.args["output_split_sizes"]))
    each = exact_quotient(size, ranks)
    if each is None or any(not same_length(part, each) for part in parts):
        return [(UNKNOWN, *axes[1:])]
    _, kept = reshape((axes[0],), [size], [ranks, each])
    first = _first_factor((kept, *axes[1:]))
    return [(_with_ranks(first, kept, ranks), *axes[1:])]


def scattered(call: OpCall) -> list[Axes]:
    """`reduce_scatter_tensor`: one of as many parts of the first axis as there are ranks."""
    axes = _axes_of_input(call)
    ranks = size_expr(call.args["group_size"])
    size = sizes_of(call.outputs[0])[0]
    _, kept = reshape((axes[0],), [size * ranks], [ranks, size])
    return [(kept, *axes[1:])]


def kept(call: OpCall) -> list[Axes]:
    """`wait_tensor`, `all_reduce`, `broadcast`: every position of the input, and of several inputs each."""
    inputs = list(call.tensors())
    if len(inputs) != len(call.outputs):
        return [unknown_axes(output) for output in call.outputs]
    return [call.axes_of(tensor) for tensor in inputs]


def sharded(axis: Axis, size: sympy.Expr, ranks: int) -> Axis:
    """One of as many equal parts of an axis as there are ranks, whichever this rank has."""
    each = exact_quotient(size, sympy.Integer(ranks))
    return UNKNOWN if each is None else reshape((axis,), [size], [sympy.Integer(ranks), each])[1]


def resharded(axes: Axes, before: torch.Tensor, after: torch.Tensor) -> Axes:
    """`from_local`, `redistribute`, `to_local` of a DTensor, which counts as the whole tensor: shards put together or
    taken, on the axes whose sizes change."""
    result = []
    for axis, old, new in zip(axes, sizes_of(before), sizes_of(after), strict=True):
        if same_length(old, new):
            result.append(axis)
        elif (ranks := exact_quotient(old, new)) is not None and ranks.is_Integer:
            result.append(sharded(axis, old, int(ranks)))
        elif (ranks := exact_quotient(new, old)) is not None:
            result.append(_with_ranks(_first_factor((axis,)), axis, ranks))
        else:
            result.append(UNKNOWN)
    return tuple(result)


def _axes_of_input(call: OpCall) -> Axes:
    return call.axes_of(next(call.tensors()))


def _first_factor(axes: Axes) -> Factor | None:
    """The outermost factor of all axes together; None where it is unknown or there is none."""
    for axis in axes:
        if axis.factors is None:
            return None
        if axis.factors:
            return axis.factors[0]
    return None


def _with_ranks(first: Factor | None, axis: Axis, ranks: sympy.Expr) -> Axis:
    """The axis with the ranks as one more outer factor. first: the factor that is next to them."""
    if axis.factors is None:
        return ONE if ranks == 1 else UNKNOWN
    return make_axis([_ranks(first, ranks), *axis.factors])


def _ranks(first: Factor | None, ranks: sympy.Expr) -> Factor:
    if first is None or len(first) > 1:
        return (Segment(NO_SOURCES, ranks),)
    for source in first[0].sources:
        if isinstance(source, Inside) and same_length(factor_length(source.factor), ranks):
            return source.factor
    return (Segment(first[0].sources, ranks),)


def _packets(names: str) -> list[OpOverloadPacket]:
    """The collectives of these names that this version of torch has."""
    spaces = [getattr(torch.ops, namespace) for namespace in NAMESPACES]
    return [getattr(space, name) for space in spaces for name in names.split() if hasattr(space, name)]


COLLECTIVE_RULES: RuleTable = {
    **dict.fromkeys(_packets("all_gather_into_tensor"), gathered),
    **dict.fromkeys(_packets("all_to_all_single"), exchanged),
    **dict.fromkeys(_packets("reduce_scatter_tensor"), scattered),
    **dict.fromkeys(_packets("wait_tensor all_reduce all_reduce_coalesced broadcast"), kept),
}
