"""Which token-layout rule an ATen operator has.

A rule maps the axes of an operator's inputs to the axes of its outputs:

    aten.cat([video, text], 1)    rule_for(aten.cat.default) is join.concatenated
    aten.linalg_qr(x)             no rule: the caller makes the outputs unknown, and counts the operator

`rule_for` looks into the table first, then at the tag that torch gives to pointwise operators. Operators that move
positions stand beside their rules (view.py, join.py, index.py); those that compute stand here: their lists are long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

from svg2_compile.passes.layout.op_call import Rule, RuleTable, packets, table
from svg2_compile.passes.layout.rules import compute
from svg2_compile.passes.layout.rules.collective import COLLECTIVE_RULES
from svg2_compile.passes.layout.rules.index import INDEX_RULES
from svg2_compile.passes.layout.rules.join import JOIN_RULES
from svg2_compile.passes.layout.rules.view import VIEW_RULES

__all__ = ["ATTENTION_PACKETS", "RULES", "SOFTMAX_PACKETS", "TOKEN_MAJOR_ATTENTION", "rule_for"]

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
    **COLLECTIVE_RULES,
    **table(_POINTWISE, compute.pointwise),
    **table(_PRESERVING, compute.preserving),
    **table(_CONSTANTS, compute.constants),
    **table(_REDUCTIONS, compute.reduction),
    **table(_ATTENTION, compute.attention),
    **table("sort topk msort argsort", compute.sorting),
    **table("mm bmm mv dot linear addmm baddbmm addmv _addmm_activation", compute.product),
    **table("convolution conv1d conv2d conv3d _convolution mkldnn_convolution cudnn_convolution", compute.convolution),
    **table("copy copy_", compute.copied),
    **table("embedding", compute.embedding),
    **table("pixel_shuffle", compute.pixel_shuffle),
    **table("pixel_unshuffle", compute.pixel_unshuffle),
}


@lru_cache(maxsize=2048)
def rule_for(func: OpOverload) -> Rule | None:
    """The rule of an operator (an in-place operator shares that of its functional twin); None where there is none."""
    packet = func.overloadpacket
    if packet in RULES:
        return RULES[packet]
    if torch.Tag.pointwise in func.tags:
        return compute.pointwise
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "aten" and name.endswith("_"):
        twins = packets(name[:-1])
        return RULES.get(twins[0]) if twins else None
    return None
