"""Token-layout rules of the ATen operators that cut and join: slices, splits, concatenations, padding, writes."""

from __future__ import annotations

import sympy

from svg2_compile.passes.layout.axes import (
    MIXED,
    ONE,
    UNKNOWN,
    Axes,
    Axis,
    blended_sources,
    concat,
    constant,
    cut,
    flip,
    resample,
    single,
)
from svg2_compile.passes.layout.lengths import counts_from_end, size_expr
from svg2_compile.passes.layout.op_call import OpCall, RuleTable, fit, is_constant, sizes_of, table
from svg2_compile.passes.layout.union import union, union_all


def start_of(call: OpCall, size: sympy.Expr) -> sympy.Expr:
    """The first position of a slice call, counted from the front and clamped to `size`."""
    given = call.args.get("start")
    start = size_expr(0 if given is None else given)
    if counts_from_end(start):
        start = start + size
    start = sympy.expand(start)
    if start.is_Integer and size.is_Integer:
        start = max(sympy.Integer(0), min(start, size))
    return start


def sliced(call: OpCall) -> list[Axes]:
    """`slice`, `narrow`: a cut; steps other than 1 resample."""
    axes, dim = list(call.axes("self")), call.dim()
    length = size_expr(call.outputs[0].shape[dim])
    if call.args.get("step", 1) == 1:
        axes[dim] = cut(axes[dim], start_of(call, call.sizes("self")[dim]), length)
    else:
        axes[dim] = resample(axes[dim], length)
    return [tuple(axes)]


def split(call: OpCall) -> list[Axes]:
    """`split`, `chunk`: cuts one after the other."""
    axes, dim = call.axes("self"), call.dim()
    result, start = [], sympy.Integer(0)
    for output in call.outputs:
        length = size_expr(output.shape[dim])
        result.append((*axes[:dim], cut(axes[dim], start, length), *axes[dim + 1 :]))
        start = start + length
    return result


def concatenated(call: OpCall) -> list[Axes]:
    """`cat`: a concatenation on one axis, the aligned union on the others."""
    rank = call.outputs[0].dim()
    tensors = [t for t in call.args["tensors"] if t.dim() == rank]  # cat skips an empty 1-D tensor
    dim = int(call.args.get("dim") or 0) % rank
    return [join([call.axes_of(tensor) for tensor in tensors], dim)]


def join(parts: list[Axes], dim: int) -> Axes:
    """The axes of a concatenation along `dim`."""
    columns = list(zip(*parts, strict=True))
    return tuple(concat(column) if d == dim else union_all(column) for d, column in enumerate(columns))


def stacked(call: OpCall) -> list[Axes]:
    """`stack`: a new axis that carries nothing, the aligned union on the others."""
    parts = [call.axes_of(tensor) for tensor in call.args["tensors"]]
    axes = [union_all(column) for column in zip(*parts, strict=True)]
    axes.insert(int(call.args.get("dim") or 0) % (len(axes) + 1), constant(len(parts)))
    return [tuple(axes)]


def padded(call: OpCall) -> list[Axes]:
    """Constant padding adds segments that carry nothing; negative padding cuts."""
    axes, pad = list(call.axes("self")), list(call.args["pad"])
    sizes = call.sizes("self")
    for index in range(len(pad) // 2):
        before, after = size_expr(pad[2 * index]), size_expr(pad[2 * index + 1])
        dim = len(axes) - 1 - index
        start, end = _cropped(before), _cropped(after)
        inner = cut(axes[dim], start, sizes[dim] - start - end)
        axes[dim] = concat([constant(before + start), inner, constant(after + end)])
    return [tuple(axes)]


def _cropped(padding: sympy.Expr) -> sympy.Expr:
    return -padding if padding.is_negative else sympy.Integer(0)


def padded_from_inside(call: OpCall) -> list[Axes]:
    """Reflection, replication and circular padding: the new positions derive from old ones."""
    return [tuple(fit(axis, size) for axis, size in zip(call.axes("self"), sizes_of(call.outputs[0]), strict=True))]


def rolled(call: OpCall) -> list[Axes]:
    """`roll`: known where the axis has no boundary."""
    axes = list(call.axes("self"))
    dims = call.args.get("dims") or range(len(axes))
    for dim in dims:
        axes[dim] = resample(axes[dim], call.outputs[0].shape[dim])
    return [tuple(axes)]


def flipped(call: OpCall) -> list[Axes]:
    """`flip`."""
    axes = list(call.axes("self"))
    for dim in call.args["dims"]:
        axes[dim] = flip(axes[dim])
    return [tuple(axes)]


def slice_scattered(call: OpCall) -> list[Axes]:
    """`slice_scatter`: the part before, the source, the part after."""
    dim = call.dim()
    if call.args.get("step", 1) != 1:
        return [replaced_by_step(call.axes("self"), call.axes("src"), dim, call.sizes("self")[dim])]
    size = call.sizes("self")[dim]
    return [replaced(call.axes("self"), call.axes("src"), dim, start_of(call, size), call.sizes("src")[dim], size)]


def replaced(axes: Axes, source: Axes, dim: int, start: sympy.Expr, length: sympy.Expr, size: sympy.Expr) -> Axes:
    """`axes` after positions `start .. start + length` of `dim` were overwritten by a tensor with axes `source`.

    Constants change nothing: zeroed tokens of a video are tokens of the video.
    """
    if is_constant(source):
        return axes
    before = (*axes[:dim], cut(axes[dim], sympy.Integer(0), start), *axes[dim + 1 :])
    after = (*axes[:dim], cut(axes[dim], start + length, size - start - length), *axes[dim + 1 :])
    parts = [part for part, kept in ((before, start), (source, length), (after, size - start - length)) if kept != 0]
    return join(parts, dim)


def replaced_by_step(axes: Axes, source: Axes, dim: int, size: sympy.Expr) -> Axes:
    """`axes` after every n-th position of `dim` was overwritten; aligned on the other axes."""
    pairs = enumerate(zip(axes, source, strict=True))
    return tuple(
        interspersed(axis, blended_sources(other), size) if d == dim else union(axis, other)
        for d, (axis, other) in pairs
    )


def interspersed(axis: Axis, new: frozenset[str] | None, size: sympy.Expr) -> Axis:
    """An axis after positions of sources `new` (None = unknown) were written to some places of it.

    Constants that are written, or overwritten, count as nothing.
    """
    old = blended_sources(axis)
    if old is None or new is None:
        return UNKNOWN
    if not new or old == new:
        return axis
    return single(old | new | {MIXED} if old else new, size)


def select_scattered(call: OpCall) -> list[Axes]:
    """`select_scatter`: one position replaced."""
    axes, dim = call.axes("self"), call.dim()
    source = (*call.axes("src")[:dim], ONE, *call.axes("src")[dim:])
    size = call.sizes("self")[dim]
    start = size_expr(call.args["index"])
    return [replaced(axes, source, dim, start + size if start.is_negative else start, sympy.Integer(1), size)]


JOIN_RULES: RuleTable = {
    **table("slice slice_copy narrow narrow_copy", sliced),
    **table("split split_copy split_with_sizes split_with_sizes_copy chunk", split),
    **table("unsafe_split unsafe_split_with_sizes unsafe_chunk", split),
    **table("cat concat concatenate", concatenated),
    **table("stack", stacked),
    **table("constant_pad_nd", padded),
    **table("reflection_pad1d reflection_pad2d reflection_pad3d", padded_from_inside),
    **table("replication_pad1d replication_pad2d replication_pad3d _pad_circular", padded_from_inside),
    **table("roll", rolled),
    **table("flip", flipped),
    **table("slice_scatter", slice_scattered),
    **table("select_scatter", select_scattered),
}
