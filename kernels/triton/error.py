"""EAR's error estimate, streamed over the keys (arXiv 2603.08982): never [query clusters, tokens] in memory.

e_ij = sum over keys t of cluster j of |exp(s q_i.k_t) v_t - exp(s q_i.k_j) v_j|^2. With r_t = exp(s q_i.(k_t - k_j))
this is exp(2 s q_i.k_j) times the sum of r_t^2 |v_t|^2 - 2 r_t v_t.v_j + |v_j|^2: per key two scalars of its value,
found once by ``_value_scalars``, and a matrix product of query centroids with keys. The sums carry a running maximum of
the exponents, as online softmax does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of, padded, require_head_dim, row_strides, rows_dense
from svg2_compile.kernels.triton.primitives import LN_2, LOG2_E, head_base, kv_group_of, load_rows

__all__ = ["ErrorInputs", "error_inputs", "log_errors"]

QUERIES_PER_PROGRAM = 64
KEYS_PER_STEP = 64


@triton.jit(do_not_specialize=["num_tokens", "num_clusters"])
def _value_scalars(
    value, v_centroids, offsets, squares, products, num_tokens, num_heads, num_clusters, v_b, v_h, v_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|v_t|^2 and v_t.v_j for the keys t of one cluster j: float32 [groups, tokens] each."""
    cluster, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    boundary = offsets + group * (num_clusters + 3) + cluster
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    value += head_base(group, num_heads, v_b, v_h)
    column = tl.arange(0, BLOCK_D)
    mean = tl.load(v_centroids + (group * num_clusters + cluster) * WIDTH + column, mask=column < WIDTH, other=0.0)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        present = row < end
        rows = load_rows(value, row, present, v_n, WIDTH, BLOCK_D).to(tl.float32)
        tl.store(squares + group * num_tokens + row, tl.sum(rows * rows, 1), mask=present)
        tl.store(products + group * num_tokens + row, tl.sum(rows * mean[None, :], 1), mask=present)


@triton.jit(do_not_specialize=["first_group", "num_tokens", "num_q_clusters", "num_k_clusters"])
def _log_errors(
    key, squares, products, offsets, q_centroids, v_centroids, logits, log_error,
    scale_log2, first_group, num_tokens, num_q_heads, num_kv_heads, num_q_clusters, num_k_clusters, k_b, k_h, k_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ln e_ij of a tile of query clusters and one key cluster; -inf for an empty one."""
    cluster, tile = tl.program_id(0), tl.program_id(1)
    group = tl.program_id(2) + first_group
    kv_group = kv_group_of(group, num_q_heads, num_kv_heads)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = row < num_q_clusters
    centroids = q_centroids + group.to(tl.int64) * num_q_clusters * WIDTH
    query = load_rows(centroids, row, is_row, WIDTH, WIDTH, BLOCK_D)
    line = (tl.program_id(2).to(tl.int64) * num_q_clusters + row) * num_k_clusters + cluster
    mean_logit = tl.load(logits + line, mask=is_row, other=0.0) * scale_log2

    kv_group = kv_group.to(tl.int64)
    boundary = offsets + kv_group * (num_k_clusters + 3) + cluster
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    key += head_base(kv_group, num_kv_heads, k_b, k_h)
    squares += kv_group * num_tokens
    products += kv_group * num_tokens
    largest = tl.zeros([BLOCK_Q], tl.float32)  # of the exponents, in powers of two; that of the centroid itself is 0
    square_sum = tl.zeros([BLOCK_Q], tl.float32)
    product_sum = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(begin, end, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        present = token < end
        keys = load_rows(key, token, present, k_n, WIDTH, BLOCK_D).to(tl.float32)
        exponent = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2 - mean_logit[:, None]
        exponent = tl.where(present[None, :], exponent, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(exponent, 1))
        ratio = tl.exp2(exponent - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        square = tl.load(squares + token, mask=present, other=0.0)
        product = tl.load(products + token, mask=present, other=0.0)
        square_sum = square_sum * shrink * shrink + tl.sum(ratio * ratio * square[None, :], 1)
        product_sum = product_sum * shrink + tl.sum(ratio * product[None, :], 1)
        largest = new_largest
    column = tl.arange(0, BLOCK_DV)
    place = (kv_group * num_k_clusters + cluster) * VALUE_WIDTH + column
    mean = tl.load(v_centroids + place, mask=column < VALUE_WIDTH, other=0.0)
    mean_ratio = tl.exp2(-largest)
    mean_sum = (end - begin).to(tl.float32) * tl.sum(mean * mean, 0) * mean_ratio * mean_ratio
    total = square_sum - 2.0 * mean_ratio * product_sum + mean_sum
    # Rounding can leave a small negative number; NaN must stay NaN.
    total = tl.where(total < 0.0, 0.0, total)
    tl.store(log_error + line, tl.log(total) + 2.0 * LN_2 * (largest + mean_logit), mask=is_row)


class ErrorInputs(NamedTuple):
    """What the estimate reads for all heads. key [B, Hkv, Nk, D] permuted; k_offsets int32 [B, Hkv, Ck + 3];
    v_centroids float32 [B, Hkv, Ck, Dv]; squares |v_t|^2 and products v_t.v_j float32 [B, Hkv, Nk]."""

    key: Tensor
    k_offsets: Tensor
    v_centroids: Tensor
    squares: Tensor
    products: Tensor


def error_inputs(key: Tensor, value: Tensor, k_offsets: Tensor, v_centroids: Tensor) -> ErrorInputs:
    """Reads every value once; permuted value [B, Hkv, Nk, Dv]."""
    batch, kv_heads, num_tokens, value_width = value.shape
    require_head_dim("select_blocks_by_error", key.shape[3], value_width)
    key, value = rows_dense(key), rows_dense(value)
    k_offsets, v_centroids = k_offsets.contiguous(), v_centroids.contiguous()
    num_clusters = v_centroids.shape[2]
    squares = key.new_zeros((batch, kv_heads, num_tokens), dtype=torch.float32)
    products = torch.zeros_like(squares)
    if squares.numel() > 0:
        with device_of(value):
            _value_scalars[num_clusters, batch * kv_heads](
                *(value, v_centroids, k_offsets, squares, products, num_tokens, kv_heads, num_clusters),
                *row_strides(value),
                **{"ROWS": 32, "WIDTH": value_width, "BLOCK_D": padded(value_width), "num_warps": 4},
            )
    return ErrorInputs(key, k_offsets, v_centroids, squares, products)


def log_errors(inputs: ErrorInputs, q_centroids: Tensor, logits: Tensor, scale: float, groups: slice) -> Tensor:
    """ln e_ij float32 [groups, Cq, Ck] for some (batch, query head) groups; logits float32 [groups, Cq, Ck] are
    q_i.k_j, not scaled."""
    _, kv_heads, num_tokens, width = inputs.key.shape
    q_heads, num_q_clusters = q_centroids.shape[1:3]
    num_k_clusters, value_width = inputs.v_centroids.shape[2:]
    log_error = torch.empty_like(logits)
    # bfloat16 and float16 keys are exact in TF32; only the query centroid is rounded, to 2^-11.
    precision = "tf32" if inputs.key.dtype != torch.float32 and torch.version.hip is None else "ieee"
    grid = (num_k_clusters, triton.cdiv(num_q_clusters, QUERIES_PER_PROGRAM), groups.stop - groups.start)
    with device_of(logits):
        _log_errors[grid](
            *(inputs.key, inputs.squares, inputs.products, inputs.k_offsets, q_centroids.contiguous()),
            *(inputs.v_centroids, logits, log_error, scale * LOG2_E.value, groups.start, num_tokens),
            *(q_heads, kv_heads, num_q_clusters, num_k_clusters, *row_strides(inputs.key)),
            **{"WIDTH": width, "BLOCK_D": padded(width), "VALUE_WIDTH": value_width},
            **{"BLOCK_DV": padded(value_width), "BLOCK_Q": QUERIES_PER_PROGRAM, "BLOCK_K": KEYS_PER_STEP},
            **{"PRECISION": precision, "num_warps": 4},
        )
    return log_error
