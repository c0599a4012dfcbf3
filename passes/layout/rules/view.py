"""Token-layout rules of the ATen operators that only look at the same positions in another way."""

from __future__ import annotations

from svg2_compile.passes.layout.axes import (
    ONE,
    UNKNOWN,
    Axes,
    constant,
    resample,
    tile,
)
from svg2_compile.passes.layout.op_call import OpCall, RuleTable, fit, sizes_of, table
from svg2_compile.passes.layout.reshape import reshape
from svg2_compile.passes.layout.union import union


def same(call: OpCall) -> list[Axes]:
    """Aliases and clones."""
    return [call.axes_of(next(call.tensors())) for _ in call.outputs]


def reshaped(call: OpCall) -> list[Axes]:
    """`view`, `reshape`, `flatten`: merge and split at the boundaries of factors."""
    (output,) = call.outputs
    if call.args.get("dtype") is not None:  # view as another dtype: only the last axis changes
        return [tuple(fit(axis, size) for axis, size in zip(call.axes("self"), sizes_of(output), strict=True))]
    return [reshape(call.axes("self"), call.sizes("self"), sizes_of(output))]


def permuted(call: OpCall) -> list[Axes]:
    """`permute`."""
    axes = call.axes("self")
    return [tuple(axes[d] for d in call.args["dims"])]


def transposed(call: OpCall) -> list[Axes]:
    """`transpose`, `t`."""
    axes = list(call.axes("self"))
    if "dim0" in call.args and axes:
        a, b = call.dim("dim0"), call.dim("dim1")
        axes[a], axes[b] = axes[b], axes[a]
        return [tuple(axes)]
    return [tuple(reversed(axes))]


def moved(call: OpCall) -> list[Axes]:
    """`movedim` with lists of source and destination."""
    axes = call.axes("self")
    source = [d % len(axes) for d in call.args["source"]]
    destination = [d % len(axes) for d in call.args["destination"]]
    rest = iter(d for d in range(len(axes)) if d not in source)
    order = [source[destination.index(d)] if d in destination else next(rest) for d in range(len(axes))]
    return [tuple(axes[d] for d in order)]


def unsqueezed(call: OpCall) -> list[Axes]:
    """`unsqueeze`."""
    axes = list(call.axes("self"))
    axes.insert(int(call.args["dim"]) % (len(axes) + 1), ONE)
    return [tuple(axes)]


def squeezed(call: OpCall) -> list[Axes]:
    """`squeeze`: of all axes of one position, of one axis, or of several."""
    axes, sizes = call.axes("self"), call.sizes("self")
    dims = call.args.get("dim")
    if dims is None:
        chosen = set(range(len(axes)))
    else:
        chosen = {d % max(len(axes), 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return [tuple(axis for d, axis in enumerate(axes) if d not in chosen or sizes[d] != 1)]


def expanded(call: OpCall) -> list[Axes]:
    """`expand`: an axis of one position carries nothing, so its copies carry nothing."""
    axes, sizes = call.axes("self"), call.sizes("self")
    new_sizes = sizes_of(call.outputs[0])
    added = len(new_sizes) - len(sizes)
    pairs = zip(axes, sizes, new_sizes[added:], strict=True)
    grown = [axis if size != 1 else constant(new) for axis, size, new in pairs]
    return [(*(constant(size) for size in new_sizes[:added]), *grown)]


def repeated(call: OpCall) -> list[Axes]:
    """`repeat`: every axis tiled."""
    axes, repeats = call.axes("self"), call.args["repeats"]
    added = len(repeats) - len(axes)
    tiled = [tile(axis, times) for axis, times in zip(axes, repeats[added:], strict=True)]
    return [(*(constant(times) for times in repeats[:added]), *tiled)]


def selected(call: OpCall) -> list[Axes]:
    """`select`: the axis goes. `unbind`: likewise for every output."""
    axes = list(call.axes("self"))
    del axes[call.dim()]
    return [tuple(axes) for _ in call.outputs]


def unfolded(call: OpCall) -> list[Axes]:
    """`unfold`: windows along an axis, their inside as a new last axis."""
    axes, dim = list(call.axes("self")), call.dim("dimension")
    inside = resample(axes[dim], call.args["size"])
    axes[dim] = resample(axes[dim], call.outputs[0].shape[dim])
    return [(*axes, inside)]


def diagonal(call: OpCall) -> list[Axes]:
    """`diagonal`: two axes become one new last axis."""
    axes = list(call.axes("self"))
    first, second = call.dim("dim1"), call.dim("dim2")
    length = call.outputs[0].shape[-1]
    joined = union(resample(axes[first], length), resample(axes[second], length))
    return [(*(axis for d, axis in enumerate(axes) if d not in (first, second)), joined)]


def strided(call: OpCall) -> list[Axes]:
    """`as_strided`: the same axes where nothing changes, else unknown."""
    source, output = call.args["self"], call.outputs[0]
    if list(source.shape) == list(output.shape) and list(source.stride()) == list(output.stride()):
        return [call.axes("self")]
    return [tuple(UNKNOWN for _ in range(output.dim()))]


def as_complex(call: OpCall) -> list[Axes]:
    """`view_as_complex`: the last axis of two positions goes."""
    return [call.axes("self")[:-1]]


def as_real(call: OpCall) -> list[Axes]:
    """`view_as_real`: a new last axis of two positions."""
    return [(*call.axes("self"), constant(2))]


VIEW_RULES: RuleTable = {
    **table("detach alias lift_fresh lift_fresh_copy lift clone contiguous _conj _neg_view", same),
    **table("resolve_conj resolve_neg", same),
    **table("detach_copy alias_copy _conj_physical conj_physical _to_dense", same),
    **table("view reshape _unsafe_view _reshape_alias _reshape_copy view_copy", reshaped),
    **table("flatten unflatten reshape_as view_as", reshaped),
    **table("permute permute_copy", permuted),
    **table("transpose transpose_copy t t_copy numpy_T swapaxes", transposed),
    **table("movedim moveaxis", moved),
    **table("unsqueeze unsqueeze_copy", unsqueezed),
    **table("squeeze squeeze_copy", squeezed),
    **table("expand expand_copy expand_as broadcast_to", expanded),
    **table("repeat", repeated),
    **table("select select_copy unbind unbind_copy", selected),
    **table("unfold unfold_copy", unfolded),
    **table("diagonal diagonal_copy", diagonal),
    **table("as_strided as_strided_copy", strided),
    **table("view_as_complex view_as_complex_copy", as_complex),
    **table("view_as_real view_as_real_copy", as_real),
}
