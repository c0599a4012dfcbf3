"""Token-layout rules of the ATen operators that compute: pointwise, reductions, contractions, attention, sampling.

A rule maps the axes of an operator's inputs to the axes of its outputs. `rule_for` finds it: the tables of this file
and of the files beside it first, then the tag that torch gives to pointwise operators. Where it finds none, the caller
makes the outputs unknown and counts the operator.

    pointwise       aligned union of all inputs, by broadcasting
    contraction     the contracted axis goes, the others stay: linear keeps the tokens, its out axis is the weight's
    attention       token axis of the query, head_dim axis of the value
    convolution     batch of x, channels of the weight, space of x resampled
    reduction       the reduced axes go
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

from svg2_compile.passes.layout.axes import (
    ONE,
    UNKNOWN,
    Axes,
    Axis,
    constant,
    make_axis,
    resample,
)
from svg2_compile.passes.layout.op_call import (
    OpCall,
    Rule,
    RuleTable,
    constant_axes,
    fit,
    packets,
    sizes_of,
    table,
    unknown_axes,
)
from svg2_compile.passes.layout.rules.index import INDEX_RULES
from svg2_compile.passes.layout.rules.join import JOIN_RULES
from svg2_compile.passes.layout.rules.view import VIEW_RULES
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


_REDUCTIONS = (
    "sum mean amax amin prod var std var_mean std_mean max min all any argmax argmin median nanmedian logsumexp norm "
    "linalg_vector_norm count_nonzero nansum nanmean mode kthvalue aminmax"
)
_PRESERVING = (
    "_to_copy _softmax _log_softmax _safe_softmax softmax log_softmax native_layer_norm layer_norm native_group_norm "
    "group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_fused_rms_norm rms_norm native_dropout dropout bernoulli cumsum cumprod cummax cummin logcumsumexp tril triu "
    "floor_divide renorm _weight_norm_interface _fft_c2c multinomial "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa avg_pool1d avg_pool2d avg_pool3d max_pool2d max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool2d adaptive_max_pool3d _fake_quantize_learnable_per_tensor_affine normal_functional"
)
_POINTWISE = (
    "complex polar masked_fill masked_fill_ floor_divide isin rrelu_with_noise quantize_per_tensor dequantize "
    "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask"
)
_CONSTANTS = (
    "arange linspace logspace zeros ones empty full eye scalar_tensor zeros_like ones_like empty_like full_like rand "
    "randn randint rand_like randn_like randint_like new_zeros new_ones new_empty new_full empty_strided "
    "new_empty_strided random_ _efficientzerotensor "
    "empty_permuted randperm tril_indices triu_indices fill fill_ zero zero_ normal normal_ uniform uniform_ "
    "bernoulli_ exponential_ hann_window hamming_window bartlett_window blackman_window kaiser_window"
)
_ATTENTION = (
    "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
    "_scaled_dot_product_attention_math_for_mps _flash_attention_forward _efficient_attention_forward "
    "_cudnn_attention_forward"
)
ATTENTION_PACKETS: frozenset[OpOverloadPacket] = frozenset(packets(_ATTENTION))
SOFTMAX_PACKETS: frozenset[OpOverloadPacket] = frozenset(packets("_softmax _safe_softmax softmax"))
TOKEN_MAJOR_ATTENTION: frozenset[OpOverloadPacket] = frozenset(
    packets("_flash_attention_forward _efficient_attention_forward")
)
"""Attention operators whose tensors are [B, N, H, D]; all others are [B, H, N, D]."""

RULES: RuleTable = {
    **VIEW_RULES,
    **JOIN_RULES,
    **INDEX_RULES,
    **table(_POINTWISE, pointwise),
    **table(_PRESERVING, preserving),
    **table(_CONSTANTS, constants),
    **table(_REDUCTIONS, reduction),
    **table(_ATTENTION, attention),
    **table("sort topk msort argsort", sorting),
    **table("mm bmm mv dot linear addmm baddbmm addmv _addmm_activation", product),
    **table("convolution conv1d conv2d conv3d _convolution mkldnn_convolution cudnn_convolution", convolution),
    **table("copy copy_", copied),
    **table("embedding", embedding),
    **table("pixel_shuffle", pixel_shuffle),
    **table("pixel_unshuffle", pixel_unshuffle),
}


@lru_cache(maxsize=2048)
def rule_for(func: OpOverload) -> Rule | None:
    """The rule of an operator (an in-place operator shares that of its functional twin); None where there is none."""
    packet = func.overloadpacket
    if packet in RULES:
        return RULES[packet]
    if torch.Tag.pointwise in func.tags:
        return pointwise
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "aten" and name.endswith("_"):
        twins = packets(name[:-1])
        return RULES.get(twins[0]) if twins else None
    return None
