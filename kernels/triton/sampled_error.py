"""The error of a sparse attention on a few rows, on the GPU.

Every head has one tile of rows, and attends with it to all keys. The keys are cut into stretches, so that there is work
for the whole device; the stretches' results are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.sampling import error_of_sums, sampled_tokens
from svg2_compile.kernels.triton.launch import device_of, padded, require_head_dim, row_strides, rows_dense
from svg2_compile.kernels.triton.primitives import LN_2, LOG2_E, head_base, kv_group_of, load_rows

__all__ = ["sampled_error"]

STRETCHES = 16
ROWS_PER_TILE = 32


@triton.jit(do_not_specialize=["num_rows", "num_boundaries"])
def _exact_rows(
    query, key, value, tokens, offsets, partial, log_sums,
    scale_log2, num_q_heads, num_kv_heads, num_rows, num_boundaries, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial [groups, splits, rows, Dv]: attention of some rows to one stretch of keys; log_sums [groups, splits,
    rows]: the natural logarithm of their sums of exponentials, -inf where the stretch has no key."""
    tile, stretch, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_group = kv_group_of(group, num_q_heads, num_kv_heads).to(tl.int64)
    group = group.to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    token = tl.load(tokens + group * num_rows + row, mask=is_row, other=0)
    queries = load_rows(query + head_base(group, num_q_heads, q_b, q_h), token, is_row, q_n, WIDTH, BLOCK_D)
    queries = queries.to(tl.float32)
    end = tl.load(offsets + kv_group * num_boundaries + num_boundaries - 2)
    length = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_K) * BLOCK_K
    key += head_base(kv_group, num_kv_heads, k_b, k_h)
    value += head_base(kv_group, num_kv_heads, v_b, v_h)
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for first in range(stretch * length, tl.minimum(end, (stretch + 1) * length), BLOCK_K):
        position = first + tl.arange(0, BLOCK_K)
        present = position < end
        keys = load_rows(key, position, present, k_n, WIDTH, BLOCK_D).to(tl.float32)
        score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        score = tl.where(present[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrunk = tl.exp2(largest - higher)
        values = load_rows(value, position, present, v_n, VALUE_WIDTH, BLOCK_DV).to(tl.float32)
        result = result * shrunk[:, None] + tl.dot(weight, values, input_precision=PRECISION)
        total = total * shrunk + tl.sum(weight, 1)
        largest = higher
    column = tl.arange(0, BLOCK_DV)
    place = (group * SPLITS + stretch) * num_rows + row
    has_keys = stretch * length < end
    tl.store(log_sums + place, tl.where(has_keys, (largest + tl.log2(total)) * LN_2, float("-inf")), mask=is_row)
    result = tl.where(has_keys, result / total[:, None], 0.0)
    mask = is_row[:, None] & (column[None, :] < VALUE_WIDTH)
    tl.store(partial + place[:, None] * VALUE_WIDTH + column[None, :], result, mask=mask)


def sampled_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    q_order: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Relative error of every head and of all together; see ``ops.sampled_error``."""
    require_head_dim("sampled_error", query.shape[3], value.shape[3])
    batch, heads, num_queries, _ = query.shape
    if batch * heads * num_queries == 0:
        sums = query.new_zeros((2, batch, heads), dtype=torch.float32)
        return error_of_sums(sums.select(0, 0), sums.select(0, 1), q_offsets)
    tokens = sampled_tokens(q_order, q_offsets, rows)
    exact = _attention_of(rows_dense(query), rows_dense(key), rows_dense(value), tokens, k_offsets, scale)
    found = out.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, value.shape[3]))
    wrong = (found.to(torch.float32) - exact).square().sum(dim=(2, 3))
    return error_of_sums(wrong, exact.square().sum(dim=(2, 3)), q_offsets)


def _attention_of(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Exact attention of some tokens, float32 [B, Hq, rows, Dv]."""
    batch, heads, rows = tokens.shape
    width, value_width = query.shape[3], value.shape[3]
    partial = query.new_empty((batch, heads, STRETCHES, rows, value_width), dtype=torch.float32)
    log_sums = query.new_empty((batch, heads, STRETCHES, rows), dtype=torch.float32)
    # bfloat16 and float16 inputs are exact in TF32; weights are rounded to 2^-11.
    precision = "tf32" if query.dtype != torch.float32 and torch.version.hip is None else "ieee"
    widest = max(padded(width), padded(value_width))
    with device_of(query):
        _exact_rows[triton.cdiv(rows, ROWS_PER_TILE), STRETCHES, batch * heads](
            *(query, key, value, tokens.contiguous(), k_offsets.contiguous(), partial, log_sums),
            *(scale * LOG2_E.value, heads, key.shape[1], rows, k_offsets.shape[2]),
            *(*row_strides(query), *row_strides(key), *row_strides(value)),
            **{"WIDTH": width, "BLOCK_D": padded(width), "VALUE_WIDTH": value_width, "BLOCK_DV": padded(value_width)},
            **{"BLOCK_R": ROWS_PER_TILE, "BLOCK_K": 32 if widest <= 128 else 16, "PRECISION": precision},
            **{
                "SPLITS": STRETCHES,
                "num_warps": 4 if precision == "tf32" else 8,
                "num_stages": 2 if widest <= 128 else 1,
            },
        )
    # A row without any key has -inf everywhere, and the result 0.
    largest = log_sums.amax(dim=2, keepdim=True)
    weights = (log_sums - largest.masked_fill(largest == float("-inf"), 0.0)).exp()
    weights = weights / weights.sum(dim=2, keepdim=True).masked_fill(largest == float("-inf"), 1.0)
    return (weights.unsqueeze(-1) * partial).sum(dim=2)
