"""Token-layout rules of the ATen operators that compute: pointwise, reductions, contractions, attention, sampling.

pointwise       aligned union of all inputs, by broadcasting
contraction     the contracted axis goes, the others stay: linear keeps the tokens, its out axis is the weight's
attention       token axis of the query, head_dim axis of the value
convolution     batch of x, channels of the weight, space of x resampled
reduction       the reduced axes go
"""

from __future__ import annotations

import torch

from svg2_compile.passes.layout.axes import ONE, UNKNOWN, Axes, Axis, constant, make_axis, resample
from svg2_compile.passes.layout.op_call import OpCall, constant_axes, fit, sizes_of, unknown_axes
from svg2_compile.passes.layout.union import union, union_all


def broadcast(operands: list[tuple[Axes, torch.Tensor]], output: torch.Tensor) -> Axes:
    """The aligned union of operands that broadcast to `output`; operands of size 1 carry nothing."""
    result = []
    for position, size in enumerate(sizes_of(output)):
        from_end = position - output.dim()
        candidates = []
        for axes, tensor in operands:
            if tensor.dim() + from_end < 0:
                continue
            if size == 1 or sizes_of(tensor)[from_end] != 1:
                candidates.append(axes[from_end])
        result.append(ONE if size == 1 else union_all(candidates) if candidates else constant(size))
    return tuple(result)


def pointwise(call: OpCall) -> list[Axes]:
    """Every output position derives from the position of the same place in every input."""
    operands = [(call.axes_of(tensor), tensor) for tensor in call.tensors()]
    return [broadcast(operands, output) for output in call.outputs]


def copied(call: OpCall) -> list[Axes]:
    """`copy_`: the positions of the source; what was there before is gone."""
    source = call.args["src"]
    return [broadcast([(call.axes_of(source), source)], output) for output in call.outputs]


def constants(call: OpCall) -> list[Axes]:
    """Factories and fills: no position derives from an input."""
    return [constant_axes(output) for output in call.outputs]


def preserving(call: OpCall) -> list[Axes]:
    """Outputs of the first tensor's rank keep its axes (softmax, norms, casts, scans, pooling, resizing)."""
    axes = call.axes_of(next(call.tensors()))
    return [
        tuple(fit(axis, size) for axis, size in zip(axes, sizes_of(output), strict=True))
        if output.dim() == len(axes)
        else unknown_axes(output)
        for output in call.outputs
    ]


def reduction(call: OpCall) -> list[Axes]:
    """The reduced axes go, or stay with length 1."""
    axes = call.axes("self")
    rank = len(axes)
    dims = call.args.get("dim")
    if dims is None or dims == []:
        reduced = set(range(rank))
    else:
        reduced = {int(d) % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = tuple(axis for d, axis in enumerate(axes) if d not in reduced)
    with_ones = tuple(ONE if d in reduced else axis for d, axis in enumerate(axes))
    return [with_ones if output.dim() == rank else kept for output in call.outputs]


def sorting(call: OpCall) -> list[Axes]:
    """`sort`, `topk`: positions of the sorted axis change places; known only where it has no boundary."""
    axes = list(call.axes("self"))
    if not axes:
        return [() for _ in call.outputs]
    dim = call.dim()
    result = []
    for output in call.outputs:
        axes[dim] = resample(axes[dim], output.shape[dim])
        result.append(tuple(axes))
    return result


def product(call: OpCall) -> list[Axes]:
    """mm, bmm, mv, dot, linear and their sums with a bias: leading axes union, the contracted axis goes."""
    left, right = _operands(call)
    a, b = call.axes_of(left), call.axes_of(right)
    if call.func.overloadpacket is torch.ops.aten.linear:
        b = b[::-1]
    rows = a[-2:-1] if left.dim() > 1 else ()
    columns = b[-1:] if right.dim() > 1 else ()
    batch = a[:-2]
    if right.dim() > 2:
        batch = tuple(union(x, y) for x, y in zip(a[:-2], b[:-2], strict=True))
    result = (*batch, *rows, *columns)
    bias = call.args.get("self") if call.func._schema.name.split("::")[1] in _WITH_BIAS else None
    if bias is not None:
        pairs = [(result, call.outputs[0]), (call.axes_of(bias), bias)]
        result = broadcast(pairs, call.outputs[0])
    return [result]


_WITH_BIAS = frozenset({"addmm", "baddbmm", "addmv", "addmm_", "baddbmm_", "_addmm_activation"})


def _operands(call: OpCall) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = (("batch1", "batch2"), ("mat1", "mat2"), ("mat", "vec"), ("input", "weight"), ("self", "mat2"))
    for first, second in pairs:
        if isinstance(call.args.get(first), torch.Tensor) and isinstance(call.args.get(second), torch.Tensor):
            return call.args[first], call.args[second]
    left, right = list(call.tensors())[:2]
    return left, right


def convolution(call: OpCall) -> list[Axes]:
    """Batch and space of the input, channels of the weight. A change of length resamples."""
    axes, weight = call.axes("input"), call.axes("weight")
    output = call.outputs[0]
    space = len(weight) - 2
    transposed = bool(call.args.get("transposed", False))
    channels = weight[1] if transposed else weight[0]
    sizes = sizes_of(output)
    result = [*axes[: len(axes) - space - 1], fit(channels, sizes[-space - 1])]
    strides = list(call.args["stride"])
    for d in range(-space, 0):
        stride = strides[d] if len(strides) > 1 else strides[0]
        keeps_positions = stride == 1 and not transposed
        result.append(fit(axes[d], sizes[d]) if keeps_positions else fit(resample(axes[d], sizes[d]), sizes[d]))
    return [tuple(result)]


def attention(call: OpCall) -> list[Axes]:
    """Fused attention: batch, heads and tokens of the query, head_dim of the value; statistics follow the query."""
    query, value = call.axes("query"), call.axes("value")
    result = []
    for index, output in enumerate(call.outputs):
        if index == 0:
            result.append((*query[:-1], value[-1]))
        elif output.dim() == len(query) - 1 and list(output.shape) == list(call.args["query"].shape[:-1]):
            result.append(query[:-1])
        else:
            result.append(unknown_axes(output))
    return result


def embedding(call: OpCall) -> list[Axes]:
    """The positions of the indices, then the columns of the table."""
    return [(*call.axes("indices"), *call.axes("weight")[1:])]


def pixel_shuffle(call: OpCall) -> list[Axes]:
    """[..., C*r*r, H, W] -> [..., C, H*r, W*r]: channels become the inner positions of both spatial axes."""
    *batch, channels, height, width = call.axes("self")
    factor = call.args["upscale_factor"]
    inner = resample(channels, factor)
    return [(*batch, resample(channels, call.outputs[0].shape[-3]), _inside(height, inner), _inside(width, inner))]


def pixel_unshuffle(call: OpCall) -> list[Axes]:
    """[..., C, H*r, W*r] -> [..., C*r*r, H, W]."""
    *batch, channels, height, width = call.axes("self")
    factor = call.args["downscale_factor"]
    *_, new_height, new_width = call.outputs[0].shape
    inner = _inside(resample(height, factor), resample(width, factor))
    return [(*batch, _inside(channels, inner), resample(height, new_height), resample(width, new_width))]


def _inside(outer: Axis, inner: Axis) -> Axis:
    """The product of two axes."""
    if outer.factors is None or inner.factors is None:
        return UNKNOWN
    return make_axis(outer.factors + inner.factors)
