"""Token-layout rules of the ATen operators that read or write the places that an index or a mask names."""

from __future__ import annotations

import sympy
import torch

from svg2_compile.passes.layout.axes import (
    NO_SOURCES,
    ONE,
    UNKNOWN,
    Axes,
    Axis,
    add_sources,
    blended_sources,
    constant,
    cut,
    interleave,
    resample,
    single,
)
from svg2_compile.passes.layout.lengths import same_length
from svg2_compile.passes.layout.op_call import OpCall, RuleTable, fit, sizes_of, table
from svg2_compile.passes.layout.rules.join import interspersed
from svg2_compile.passes.layout.union import union, union_all


def repeat_interleaved(call: OpCall) -> list[Axes]:
    """`repeat_interleave` by one number keeps boundaries; by a tensor of counts only the sources."""
    axes = list(call.axes_of(next(call.tensors())))
    if call.args.get("dim") is None:  # flattens first; or turns counts into indices
        return [tuple(_gathered_from(axes, call.outputs[0].shape[0]))]
    dim, repeats = call.dim(), call.args.get("repeats")
    if isinstance(repeats, (int, torch.SymInt)):
        axes[dim] = interleave(axes[dim], repeats)
    else:
        axes[dim] = resample(axes[dim], call.outputs[0].shape[dim])
    return [tuple(axes)]


def looked_up(axis: Axis, index: Axis) -> Axis:
    """The positions of an index tensor that point into `axis`; mixed where that has a boundary."""
    sources = blended_sources(axis)
    return UNKNOWN if sources is None else add_sources(index, sources)


def index_selected(call: OpCall) -> list[Axes]:
    """`index_select`."""
    axes = list(call.axes("self"))
    if axes:
        dim = call.dim()
        index = call.axes("index")
        axes[dim] = looked_up(axes[dim], index[0] if index else ONE)
    return [tuple(axes)]


def gathered(call: OpCall) -> list[Axes]:
    """`gather`: the shape of the index; the gathered axis is looked up, the others are aligned."""
    axes, index = call.axes("self"), call.axes("index")
    sizes, index_sizes = call.sizes("self"), call.sizes("index")
    result = []
    for d, (axis, picked) in enumerate(zip(axes, index, strict=True)):
        if d == call.dim():
            result.append(looked_up(axis, picked))
        else:
            aligned = axis if same_length(sizes[d], index_sizes[d]) else cut(axis, sympy.Integer(0), index_sizes[d])
            result.append(union(aligned, picked))
    return [tuple(result)]


def indexed(call: OpCall) -> list[Axes]:
    """`index.Tensor`: integer indices broadcast together and replace the axes that they index; masks gather."""
    axes, indices = call.axes("self"), list(call.args["indices"])
    output = call.outputs[0]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return [_masked(call, axes, indices)]
    places = [d for d, index in enumerate(indices) if index is not None]
    rank = max(indices[d].dim() for d in places)
    where = places[0] if places[-1] - places[0] == len(places) - 1 else 0
    picked: list[Axis] = []
    for position in range(-rank, 0):
        candidates = [
            looked_up(axes[d], call.axes_of(indices[d])[position])
            for d in places
            if indices[d].dim() + position >= 0 and sizes_of(indices[d])[position] != 1
        ]
        picked.append(union_all(candidates))
    kept = [axis for d, axis in enumerate(axes) if d not in places]
    result = [*kept[:where], *picked, *kept[where:]]
    return [tuple(fit(axis, size) for axis, size in zip(result, sizes_of(output), strict=True))]


def _masked(call: OpCall, axes: Axes, indices: list[torch.Tensor | None]) -> Axes:
    """One boolean mask (and nothing else): the axes that it covers become one axis of chosen positions."""
    output = call.outputs[0]
    masks = [(d, index) for d, index in enumerate(indices) if index is not None]
    if len(masks) != 1:
        return tuple(UNKNOWN for _ in range(output.dim()))
    place, mask = masks[0]
    covered = [*axes[place : place + mask.dim()], *call.axes_of(mask)]
    chosen = _gathered_from(covered, output.shape[place])
    return (*axes[:place], *chosen, *axes[place + mask.dim() :])


def _gathered_from(axes: list[Axis], length: int | torch.SymInt) -> list[Axis]:
    """One axis of positions picked from all of `axes` together."""
    sources = _blended(axes)
    return [UNKNOWN if sources is None else single(sources, length)]


def _blended(axes: list[Axis]) -> frozenset[str] | None:
    """The sources of positions taken from anywhere on any of `axes`; None where one is unknown."""
    blended = [blended_sources(axis) for axis in axes]
    known = [sources for sources in blended if sources is not None]
    return NO_SOURCES.union(*known) if len(known) == len(blended) else None


def picked_by_mask(call: OpCall) -> list[Axes]:
    """`masked_select`, `nonzero`: as many positions as the mask has; the columns of `nonzero` carry nothing."""
    output = call.outputs[0]
    axes = [axis for tensor in call.tensors() for axis in call.axes_of(tensor)]
    return [(*_gathered_from(axes, output.shape[0]), *(constant(size) for size in output.shape[1:]))]


def written_anywhere(call: OpCall) -> list[Axes]:
    """`scatter`, `index_copy`, `index_put`, `masked_scatter`: written at places that only the run knows."""
    others = [axis for tensor in call.tensors() if tensor is not call.args["self"] for axis in call.axes_of(tensor)]
    sources = _blended(others)
    pairs = zip(call.axes("self"), call.sizes("self"), strict=True)
    return [tuple(interspersed(axis, sources, size) for axis, size in pairs)]


INDEX_RULES: RuleTable = {
    **table("repeat_interleave", repeat_interleaved),
    **table("index_select", index_selected),
    **table("gather", gathered),
    **table("index _unsafe_index", indexed),
    **table("masked_select nonzero", picked_by_mask),
    **table("scatter scatter_add scatter_reduce index_copy index_add index_fill", written_anywhere),
    **table("index_put _unsafe_index_put _index_put_impl masked_scatter", written_anywhere),
}
