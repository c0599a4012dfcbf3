"""What the means of skipped clusters leave out, on the GPU: residuals of query clusters, slopes of key heads.

Both are sums over all clustered keys of one matrix product each. The keys are cut into stretches, so that there is work
for the whole device, and the stretches' sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.error import block_estimates
from svg2_compile.kernels.triton.launch import chunks, device_of, padded, require_head_dim, row_strides, rows_dense
from svg2_compile.kernels.triton.plan import label_keys
from svg2_compile.kernels.triton.primitives import LOG2_E, head_base, kv_group_of, load_rows

__all__ = ["first_order_estimates", "first_order_terms"]

STRETCHES = 8


@triton.jit
def _differences(tokens, means, token, mean, present, column, stride_n, WIDTH: tl.constexpr):
    """Some columns of tokens less those of their means, float32 [n, columns]; 0 where masked."""
    here = present[:, None] & (column[None, :] < WIDTH)
    values = tl.load(tokens + token.to(tl.int64)[:, None] * stride_n + column[None, :], mask=here, other=0.0)
    return values.to(tl.float32) - tl.load(means + mean[:, None] * WIDTH + column[None, :], mask=here, other=0.0)


@triton.jit(do_not_specialize=["first_group", "num_q_clusters", "num_k_clusters", "num_keys"])
def _residuals(
    key, value, offsets, block_of_key, q_centroids, v_centroids, bias, partial,
    scale_log2, first_group, num_q_heads, num_kv_heads, num_q_clusters, num_k_clusters, num_keys, num_groups,
    k_b, k_h, k_n, v_b, v_h, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial [splits, groups, Cq, Dv]: sum over one stretch of keys of exp(s q.k + bias) (v_t - v_j)."""
    tile, stretch = tl.program_id(0), tl.program_id(1)
    group = tl.program_id(2) + first_group
    kv_group = kv_group_of(group, num_q_heads, num_kv_heads).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = row < num_q_clusters
    centroids = q_centroids + group.to(tl.int64) * num_q_clusters * WIDTH
    query = load_rows(centroids, row, is_row, WIDTH, WIDTH, BLOCK_D)
    bias += (tl.program_id(2).to(tl.int64) * num_q_clusters + row) * num_k_clusters
    end = tl.load(offsets + kv_group * (num_k_clusters + 3) + num_k_clusters)
    length = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_K) * BLOCK_K
    key += head_base(kv_group, num_kv_heads, k_b, k_h)
    value += head_base(kv_group, num_kv_heads, v_b, v_h)
    column = tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for first in range(stretch * length, tl.minimum(end, (stretch + 1) * length), BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        present = token < end
        cluster = tl.load(block_of_key + kv_group * num_keys + token, mask=present, other=0)
        known = is_row[:, None] & present[None, :]
        offset = tl.load(bias[:, None] + cluster[None, :], mask=known, other=float("-inf"))
        keys = load_rows(key, token, present, k_n, WIDTH, BLOCK_D).to(tl.float32)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2 + offset
        # What is not skipped has -inf, also where its score is infinite or NaN.
        weight = tl.where(offset == float("-inf"), 0.0, tl.exp2(score))
        means = kv_group * num_k_clusters + cluster
        spread = _differences(value, v_centroids, token, means, present, column, v_n, VALUE_WIDTH)
        total += tl.dot(weight, spread, input_precision=PRECISION)
    place = ((stretch * num_groups + tl.program_id(2)).to(tl.int64) * num_q_clusters + row) * VALUE_WIDTH
    mask = is_row[:, None] & (column[None, :] < VALUE_WIDTH)
    tl.store(partial + place[:, None] + column[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["num_k_clusters", "num_keys"])
def _slopes(
    key, value, offsets, block_of_key, k_centroids, v_centroids, partial,
    num_kv_heads, num_k_clusters, num_keys, num_groups, k_b, k_h, k_n, v_b, v_h, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial [splits, groups, D, Dv]: one tile of the sum over one stretch of keys of (k_t - c_j) (v_t - v_j)'."""
    tile, stretch, kv_group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(VALUE_WIDTH, BLOCK_DV)
    end = tl.load(offsets + kv_group * (num_k_clusters + 3) + num_k_clusters)
    length = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_K) * BLOCK_K
    key += head_base(kv_group, num_kv_heads, k_b, k_h)
    value += head_base(kv_group, num_kv_heads, v_b, v_h)
    dim = tile // across * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tile % across * BLOCK_DV + tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    for first in range(stretch * length, tl.minimum(end, (stretch + 1) * length), BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        present = token < end
        cluster = tl.load(block_of_key + kv_group * num_keys + token, mask=present, other=0)
        means = kv_group * num_k_clusters + cluster
        away = _differences(key, k_centroids, token, means, present, dim, k_n, WIDTH)
        spread = _differences(value, v_centroids, token, means, present, column, v_n, VALUE_WIDTH)
        total += tl.dot(tl.trans(away), spread, input_precision=PRECISION)
    place = (stretch * num_groups + kv_group) * WIDTH * VALUE_WIDTH + dim[:, None] * VALUE_WIDTH + column[None, :]
    tl.store(partial + place, total, mask=(dim[:, None] < WIDTH) & (column[None, :] < VALUE_WIDTH))


def first_order_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masses, errors and the residual if nothing is selected; see ``ops.first_order_estimates``. Graphs for a GPU do
    not ask for it: this serves those that were made for a CPU."""
    clustered = (key, value, k_offsets, q_centroids, k_centroids, v_centroids)
    log_mass, log_error = block_estimates(*clustered, scale)
    rows, columns = log_mass.shape[2] + 2, log_mass.shape[3]
    nothing = log_mass.new_zeros((*log_mass.shape[:2], rows, columns), dtype=torch.bool)
    residual, _ = first_order_terms(*clustered, log_mass, nothing, scale)
    return log_mass, log_error, residual


def first_order_terms(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    block_map: Tensor,
    scale: float,
    residual_of_all: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual of every query cluster and slope of every key head; see ``ops.first_order_terms``. residual_of_all is
    of no use here: in a tile of query clusters, some one selects nearly every key."""
    require_head_dim("first_order_terms", key.shape[3], value.shape[3])
    batch, q_heads, num_q_clusters, width = q_centroids.shape
    kv_heads, num_k_clusters, value_width = v_centroids.shape[1:]
    residual = q_centroids.new_zeros(batch, q_heads, num_q_clusters, value_width)
    slope = q_centroids.new_zeros(batch, kv_heads, width, value_width)
    if key.numel() == 0 or value.numel() == 0 or residual.numel() == 0:
        return residual, slope
    key, value, k_offsets = rows_dense(key), rows_dense(value), k_offsets.contiguous()
    tokens = (key, value, k_offsets, label_keys(k_offsets, key.shape[2]))
    means = (k_centroids.contiguous(), v_centroids.contiguous())
    skipped = block_map.logical_not().narrow(2, 0, num_q_clusters).narrow(3, 0, num_k_clusters)
    filled = (k_offsets.diff(dim=-1).narrow(-1, 0, num_k_clusters) > 0).unsqueeze(2)
    skipped = (skipped & filled.repeat_interleave(q_heads // kv_heads, dim=1)).flatten(0, 1)
    mass = log_mass.narrow(3, 0, num_k_clusters).flatten(0, 1)
    residuals = []
    for groups in chunks(batch * q_heads, 4 * num_q_clusters * (2 * num_k_clusters + STRETCHES * value_width)):
        of_chunk = (0, groups.start, groups.stop - groups.start)
        weighted = _residuals_of(
            tokens, q_centroids, means[1], mass.narrow(*of_chunk), skipped.narrow(*of_chunk), scale, groups
        )
        residuals.append(weighted)
    num_clustered = k_offsets.narrow(2, num_k_clusters, 1).clamp(min=1).unsqueeze(-1)
    return torch.cat(residuals).view_as(residual), _slopes_of(tokens, means).view_as(slope) * scale / num_clustered


def _precision(tokens: Tensor) -> str:
    # bfloat16 and float16 keys are exact in TF32; differences to means and weights are rounded, to 2^-11.
    return "tf32" if tokens.dtype != torch.float32 and torch.version.hip is None else "ieee"


def _residuals_of(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    q_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    skipped: Tensor,
    scale: float,
    groups: slice,
) -> Tensor:
    """D_i float32 [groups, Cq, Dv] of some (batch, query head) groups; log_mass and skipped [groups, Cq, Ck]."""
    key, value, _, block_of_key = tokens
    num_groups, num_q_clusters, num_k_clusters = log_mass.shape
    # Weights sum to one over what a query skips.
    total = log_mass.masked_fill(skipped.logical_not(), float("-inf")).logsumexp(dim=-1, keepdim=True)
    bias = (-LOG2_E.value * total).expand_as(log_mass).masked_fill(skipped.logical_not(), float("-inf")).contiguous()
    width, value_width = key.shape[3], value.shape[3]
    partial = log_mass.new_empty(STRETCHES, num_groups, num_q_clusters, value_width)
    precision = _precision(key)
    widest = max(padded(width), padded(value_width))
    # What is in use stays in registers and in 99 KiB of shared memory, as of the error estimate.
    rows = (64 if widest <= 64 else 32) if precision == "tf32" else (32 if widest <= 128 else 16)
    steps = 32 if precision == "tf32" else rows
    with device_of(key):
        _residuals[triton.cdiv(num_q_clusters, rows), STRETCHES, num_groups](
            *(*tokens, q_centroids.contiguous(), v_centroids, bias, partial, scale * LOG2_E.value, groups.start),
            *(q_centroids.shape[1], key.shape[1], num_q_clusters, num_k_clusters, block_of_key.shape[2], num_groups),
            *(*row_strides(key), *row_strides(value)),
            **{"WIDTH": width, "BLOCK_D": padded(width), "VALUE_WIDTH": value_width, "BLOCK_DV": padded(value_width)},
            **{"BLOCK_Q": rows, "BLOCK_K": steps, "PRECISION": precision, "SPLITS": STRETCHES},
            **{"num_warps": 4 if precision == "tf32" else 8, "num_stages": 2 if widest <= 128 else 1},
        )
    return partial.sum(dim=0).masked_fill(skipped.any(dim=-1, keepdim=True).logical_not(), 0.0)


def _slopes_of(tokens: tuple[Tensor, Tensor, Tensor, Tensor], means: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over all clustered keys of (k_t - c_j) (v_t - v_j)': float32 [B * Hkv, D, Dv]."""
    key, value = tokens[:2]
    batch, kv_heads, num_keys, width = key.shape
    value_width = value.shape[3]
    partial = means[0].new_empty(STRETCHES, batch * kv_heads, width, value_width)
    precision = _precision(key)
    block_d, block_dv = (min(64 if precision == "tf32" else 32, padded(extent)) for extent in (width, value_width))
    tiles = triton.cdiv(width, block_d) * triton.cdiv(value_width, block_dv)
    with device_of(key):
        _slopes[tiles, STRETCHES, batch * kv_heads](
            *(*tokens, *means, partial, kv_heads, means[0].shape[2], num_keys, batch * kv_heads),
            *(*row_strides(key), *row_strides(value)),
            **{"WIDTH": width, "BLOCK_D": block_d, "VALUE_WIDTH": value_width, "BLOCK_DV": block_dv},
            **{"BLOCK_K": 32, "PRECISION": precision, "SPLITS": STRETCHES, "num_warps": 4, "num_stages": 2},
        )
    return partial.sum(dim=0)
