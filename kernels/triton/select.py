"""Which key blocks each query block attends to: by softmax mass (SVG2 section 4.2) or by compensation error (EAR).

One program decides one row. Sorting is not needed: the threshold at which the budget is reached is found bit by bit
(``primitives.keep_until``). Logits of centroids are a plain matrix product, done by torch, for as many heads at a time
as SCORE_BYTES allow.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.error import ErrorInputs, error_inputs, log_errors
from svg2_compile.kernels.triton.launch import chunks, device_of, of_groups
from svg2_compile.kernels.triton.primitives import keep_until, kv_group_of, sortable

__all__ = ["select_blocks", "select_blocks_by_error"]


@triton.jit
def _by_mass(logits, sizes, present, top_p, density, min_clusters, num_keys, FIXED_DENSITY: tl.constexpr):
    """Clusters kept by softmax mass, bool [n]; logits float32 [n] are scaled, sizes int32 [n]."""
    size = sizes.to(tl.float32)
    filled = present & (sizes > 0)
    log_mass = tl.where(filled, logits + tl.log(tl.where(filled, size, 1.0)), float("-inf"))
    largest = tl.max(log_mass, 0)
    weight = tl.where(filled, tl.exp(log_mass - largest), 0.0)
    mass = weight / tl.sum(weight, 0)
    priority = sortable(tl.where(filled, mass, -1.0))  # empty clusters come last
    if FIXED_DENSITY:
        kept = keep_until(priority, size, tl.maximum(density * num_keys, 1.0), present)
    else:
        kept = keep_until(priority, mass, top_p, present)
        kept = kept | keep_until(priority, tl.where(present, 1.0, 0.0), min_clusters, present)
    return kept & filled


@triton.jit(do_not_specialize=["first_group", "num_q_clusters", "num_k_clusters", "k_sizes_stride"])
def _select_rows(
    logits, log_error, k_sizes, block_map, scale, top_p, density, min_clusters,
    first_group, num_q_heads, num_kv_heads, num_q_clusters, num_k_clusters, k_sizes_stride,
    BLOCK: tl.constexpr, EVERYTHING: tl.constexpr, FIXED_DENSITY: tl.constexpr, BY_ERROR: tl.constexpr,
):  # fmt: skip
    """One row of the block map: a query cluster's, the context row or the null row."""
    row, group = tl.program_id(0), tl.program_id(1) + first_group
    column = tl.arange(0, BLOCK)
    present = column < num_k_clusters
    is_cluster = row < num_q_clusters
    if EVERYTHING:
        kept = present
    else:
        k_sizes += kv_group_of(group, num_q_heads, num_kv_heads).to(tl.int64) * k_sizes_stride
        size = tl.load(k_sizes + column, mask=present, other=0)
        num_keys = tl.sum(size, 0).to(tl.float32)
        # The chunk's own matrices begin at its first group; rows beyond the clusters read the last one's.
        line = tl.program_id(1).to(tl.int64) * num_q_clusters + tl.minimum(row, num_q_clusters - 1)
        logit = tl.load(logits + line * num_k_clusters + column, mask=present, other=0.0) * scale
        filled = present & (size > 0)
        broken = filled & ~(tl.abs(logit) < float("inf"))
        # A row with a non-finite logit keeps every cluster, so that NaN shows as in dense attention.
        everything = tl.max(broken.to(tl.int32), 0) != 0
        kept = present & everything
        if not (BY_ERROR and FIXED_DENSITY):  # which need no mass
            kept |= _by_mass(logit, size, present, top_p, density, min_clusters, num_keys, FIXED_DENSITY)
        if BY_ERROR:
            if FIXED_DENSITY:
                budget = density * num_keys
            else:
                budget = tl.sum(tl.where(kept, size, 0).to(tl.float32), 0)
            keeps_all = tl.min((kept | ~present).to(tl.int32), 0) != 0
            error = tl.load(log_error + line * num_k_clusters + column, mask=present, other=0.0)
            unknown = filled & (error != error)
            per_key = tl.where(filled, error - tl.log(tl.where(filled, size, 1).to(tl.float32)), float("-inf"))
            chosen = keep_until(sortable(per_key), size.to(tl.float32), tl.maximum(budget, 1.0), filled)
            everything = keeps_all | (tl.max(unknown.to(tl.int32), 0) != 0)
            kept = (chosen & ~everything) | (present & everything)
    is_context = row == num_q_clusters
    is_null_row = row == num_q_clusters + 1
    keep = (kept & is_cluster) | (present & is_context) | (column == num_k_clusters)
    keep = keep & ~(is_null_row & (column != num_k_clusters))
    width = num_k_clusters + 2
    line_out = (group.to(tl.int64) * (num_q_clusters + 2) + row) * width
    tl.store(block_map + line_out + column, keep.to(tl.int8), mask=column < width)


def _logits(q_centroids: Tensor, k_centroids: Tensor, groups: slice) -> Tensor:
    """q_i.k_j of some (batch, query head) groups: float32 [groups, Cq, Ck]."""
    sharing = q_centroids.shape[1] // k_centroids.shape[1]
    queries, keys = of_groups(q_centroids, groups), of_groups(k_centroids, groups, sharing)
    return torch.matmul(queries, keys.transpose(-1, -2))


def _select(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None,
    inputs: ErrorInputs | None,
) -> Tensor:
    """The block map. k_sizes int32 [B, Hkv, >= Ck]; inputs: of the error estimate, to select by it."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    kv_heads, num_k_clusters = k_centroids.shape[1:3]
    shape = (batch, q_heads, num_q_clusters + 2, num_k_clusters + 2)
    block_map = q_centroids.new_empty(shape, dtype=torch.bool)
    num_groups = batch * q_heads
    if num_groups == 0:
        return block_map
    everything = (top_p if density is None else density) >= 1
    # ceil, but 0.1 * 30 must give 3 and not 4
    min_clusters = max(math.ceil(min_k_ratio * num_k_clusters - 1e-9), 1)
    block = triton.next_power_of_2(num_k_clusters + 2)
    k_sizes = k_sizes.contiguous()
    with device_of(q_centroids):
        matrices = 1 if inputs is None else 5  # logits, errors, and what a softmax needs
        for groups in chunks(num_groups, matrices * 4 * num_q_clusters * num_k_clusters):
            logits = q_centroids if everything else _logits(q_centroids, k_centroids, groups)
            error = logits
            if inputs is not None and not everything:
                error = log_errors(inputs, q_centroids, logits, scale, groups)
            _select_rows[num_q_clusters + 2, groups.stop - groups.start](
                *(logits, error, k_sizes, block_map.view(torch.int8), scale, float(top_p), float(density or 0.0)),
                *(float(min_clusters), groups.start, q_heads, kv_heads, num_q_clusters, num_k_clusters),
                k_sizes.shape[2],
                **{"BLOCK": block, "EVERYTHING": everything, "FIXED_DENSITY": density is not None},
                **{"BY_ERROR": inputs is not None, "num_warps": min(max(block // 512, 1), 16)},
            )
    return block_map


def select_blocks(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None = None,
) -> Tensor:
    """Largest softmax mass first; see ``ops.select_blocks``."""
    return _select(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density, None)


def select_blocks_by_error(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    q_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None = None,
) -> Tensor:
    """Largest compensation error per key first; see ``ops.select_blocks_by_error``."""
    k_sizes = k_offsets.diff(dim=-1)
    inputs = error_inputs(key, value, k_offsets, v_centroids)
    return _select(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density, inputs)
