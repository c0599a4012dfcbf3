"""Lloyd's k-means: fused assignment on the tensor cores, update by sorted segments. No atomics, no host reads.

One iteration is an assignment (``_assign``: the scores of a tile of tokens against all centroids live in registers
only), a counting sort of the labels, and one program per cluster that sums its members and prepares the new centroid
for the next assignment (``_update``). Centroids are kept twice: float32 as the result, and rounded to the tokens'
dtype, padded and with their half norms, as the assignment reads them. Norms are those of the rounded centroids, so that
a label is exactly the nearest rounded centroid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of, padded, require_head_dim, row_strides, rows_dense
from svg2_compile.kernels.triton.means import ROWS_PER_STEP, sum_segment
from svg2_compile.kernels.triton.order import counting_sort
from svg2_compile.kernels.triton.primitives import EXACT, head_base, load_rows
from svg2_compile.kernels.tuning.lookup import tuned

__all__ = ["kmeans"]

# The half norm of a centroid that nobody may choose: finite, since infinity with index bits in its mantissa is NaN.
UNUSABLE = tl.constexpr(1e30)


# Integers that no address alignment depends on: one compiled kernel serves all their values.
COUNTS = ["num_tokens", "num_clusters", "num_padded"]


class Prepared(NamedTuple):
    """Centroids as the assignment reads them, for all groups: rows [groups, padded C, BLOCK_D] in the tokens' dtype,
    half norms float32 [groups, padded C]. Padding rows are unusable."""

    rows: Tensor
    half_norms: Tensor


@triton.jit
def _store_centroid(
    centroid, centroids, prepared, half_norms, group, cluster, num_clusters, num_padded,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one centroid float32 [BLOCK_D], zero beyond WIDTH, in both forms."""
    column = tl.arange(0, BLOCK_D)
    row = group * num_clusters + cluster
    width = tl.where(cluster < num_clusters, WIDTH, 0)  # a padding row is no centroid
    tl.store(centroids + row * WIDTH + column, centroid, mask=column < width)
    rounded = centroid.to(prepared.dtype.element_ty)
    exact = rounded.to(tl.float32)
    half_norm = tl.sum(exact * exact, 0) * 0.5
    usable = (half_norm < UNUSABLE) & (cluster < num_clusters)  # False for NaN as well
    row = group * num_padded + cluster
    tl.store(prepared + row * BLOCK_D + column, tl.where(usable, rounded, 0.0))
    tl.store(half_norms + row, tl.where(usable, half_norm, UNUSABLE))


@triton.jit
def _seed_token(valid, cluster, num_clusters, num_tokens, HAS_VALID: tl.constexpr, TILE: tl.constexpr):
    """The middle token of the cluster-th of ``num_clusters`` equal stretches of the valid tokens."""
    if HAS_VALID:
        num_valid = tl.zeros([TILE], tl.int64)
        for first in range(0, num_tokens, TILE):
            token = first + tl.arange(0, TILE)
            num_valid += (tl.load(valid + token, mask=token < num_tokens, other=0) != 0).to(tl.int64)
        rank = ((2 * cluster + 1) * tl.sum(num_valid, 0)) // (2 * num_clusters)
        seed = tl.sum(tl.zeros([TILE], tl.int64), 0)
        seen = seed
        for first in range(0, num_tokens, TILE):
            token = first + tl.arange(0, TILE)
            is_valid = (tl.load(valid + token, mask=token < num_tokens, other=0) != 0).to(tl.int64)
            position = seen + tl.cumsum(is_valid, 0) - is_valid
            seed += tl.sum(tl.where((is_valid != 0) & (position == rank), token, 0).to(tl.int64), 0)
            seen += tl.sum(is_valid, 0)
    else:
        seed = ((2 * cluster + 1) * num_tokens) // (2 * num_clusters)
    return seed


@triton.jit(do_not_specialize=COUNTS)
def _start(
    x, given, seeded, valid, centroids, prepared, half_norms, num_tokens, num_clusters, num_padded, num_heads,
    x_b, x_h, x_n, valid_b, valid_h,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, HAS_VALID: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first centroids: those given where ``seeded``, else evenly spread tokens."""
    cluster, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    real = column < tl.where(cluster < num_clusters, WIDTH, 0)
    if tl.load(seeded) != 0:
        row = group * num_clusters + cluster
        centroid = tl.load(given + row * WIDTH + column, mask=real, other=0.0)
    else:
        valid += (group // num_heads) * valid_b + (group % num_heads) * valid_h
        token = _seed_token(valid, tl.minimum(cluster, num_clusters - 1), num_clusters, num_tokens, HAS_VALID, TILE)
        x += head_base(group, num_heads, x_b, x_h)
        centroid = tl.load(x + token * x_n + column, mask=real, other=0.0).to(tl.float32)
    _store_centroid(centroid, centroids, prepared, half_norms, group, cluster, num_clusters, num_padded, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def _assign(
    x, prepared, half_norms, labels, num_tokens, num_clusters, num_padded, num_heads, x_b, x_h, x_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_BITS: tl.constexpr,
):  # fmt: skip
    """labels[t] = argmax over centroids of x_t.c - |c|^2 / 2.

    Every lane of a [BLOCK_N, BLOCK_C] tile keeps the best score of its column with the number of the centroid tile in
    the low bits of the mantissa: one maximum per score instead of a compare and two selects. That moves a score by less
    than 2^(TILE_BITS - 23) of its size.
    """
    group = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = token < num_tokens
    x += head_base(group, num_heads, x_b, x_h)
    tokens = load_rows(x, token, present, x_n, WIDTH, BLOCK_D)
    column = tl.arange(0, BLOCK_C)
    width = tl.arange(0, BLOCK_D)
    prepared += group.to(tl.int64) * num_padded * BLOCK_D
    half_norms += group.to(tl.int64) * num_padded
    TILE_MASK: tl.constexpr = (1 << TILE_BITS) - 1
    best = tl.full([BLOCK_N, BLOCK_C], -3e38, tl.float32)
    for first in range(0, num_padded, BLOCK_C):
        rows = tl.load(prepared + (first + column)[:, None] * BLOCK_D + width[None, :])
        score = tl.dot(tokens, tl.trans(rows), input_precision=EXACT)
        score -= tl.load(half_norms + first + column)[None, :]
        packed = (score.to(tl.int32, bitcast=True) & ~TILE_MASK) | (first // BLOCK_C)
        best = tl.maximum(best, packed.to(tl.float32, bitcast=True))
    winner = tl.max(best, 1)
    place = tl.min(tl.where(best == winner[:, None], column[None, :], BLOCK_C - 1), 1)
    label = (winner.to(tl.int32, bitcast=True) & TILE_MASK) * BLOCK_C + place
    # A token with NaN has no best centroid; its label is arbitrary but in range.
    label = tl.minimum(tl.maximum(label, 0), num_clusters - 1)
    tl.store(labels + group.to(tl.int64) * num_tokens + token, label, mask=present)


@triton.jit(do_not_specialize=COUNTS)
def _update(
    x, order, offsets, centroids, prepared, half_norms, sizes, num_tokens, num_clusters, num_padded, num_heads,
    x_b, x_h, x_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """centroid = mean of the members; an empty cluster keeps the centroid that it had."""
    cluster, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    boundary = offsets + group * (num_clusters + 3) + cluster
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    tl.store(sizes + group * num_clusters + cluster, end - begin)
    if end > begin:
        x += head_base(group, num_heads, x_b, x_h)
        total = sum_segment(x, order + group * num_tokens, begin, end, x_n, ROWS, WIDTH, BLOCK_D, True)
        mean = total / (end - begin).to(tl.float32)
        _store_centroid(mean, centroids, prepared, half_norms, group, cluster, num_clusters, num_padded, WIDTH, BLOCK_D)


def kmeans(
    x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm; see ``ops.kmeans``. 5 launches per iteration, however many groups."""
    batch, heads, num_tokens, width = x.shape
    require_head_dim("kmeans", width)
    num_clusters = centroids.shape[2]
    groups = batch * heads
    labels = x.new_empty((batch, heads, num_tokens), dtype=torch.int32)
    means = x.new_empty((batch, heads, num_clusters, width), dtype=torch.float32)
    sizes = x.new_zeros((batch, heads, num_clusters), dtype=torch.int32)
    if groups == 0 or width == 0:
        return labels.zero_(), means, sizes
    x = rows_dense(x)
    with device_of(x):
        block_c = tuned("kmeans_assign", x.device, x.dtype, width, num_tokens)["BLOCK_C"]
        num_padded = triton.cdiv(num_clusters, block_c) * block_c
        prepared = Prepared(
            x.new_empty(groups, num_padded, padded(width)),
            x.new_empty(groups, num_padded, dtype=torch.float32),
        )
        _launch_start(x, centroids, seeded, valid, means, prepared)
        for _ in range(iters):
            launch_assign(x, prepared, labels, num_clusters)
            order, offsets = counting_sort(labels, num_clusters, 0, num_tokens, valid)
            _update[num_clusters, groups](
                *(x, order, offsets, means, *prepared, sizes, num_tokens, num_clusters, num_padded, heads),
                *row_strides(x),
                **{"ROWS": ROWS_PER_STEP, "WIDTH": width, "BLOCK_D": padded(width), "num_warps": 4},
            )
    return labels, means, sizes


def _launch_start(
    x: Tensor, given: Tensor, seeded: Tensor, valid: Tensor | None, means: Tensor, prepared: Prepared
) -> None:
    batch, heads, num_tokens, width = x.shape
    num_clusters, num_padded = means.shape[2], prepared.rows.shape[1]
    mask, mask_b, mask_h = seeded, 0, 0
    if valid is not None:
        mask = valid.contiguous().view(torch.uint8)
        mask_b, mask_h = mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0
    _start[num_padded, batch * heads](
        *(x, given.contiguous(), seeded.view(torch.uint8), mask, means, *prepared),
        *(num_tokens, num_clusters, num_padded, heads, *row_strides(x), mask_b, mask_h),
        **{"WIDTH": width, "BLOCK_D": padded(width), "HAS_VALID": valid is not None, "TILE": 1024, "num_warps": 1},
    )


def launch_assign(x: Tensor, prepared: Prepared, labels: Tensor, num_clusters: int) -> None:
    """One assignment of all tokens x [B, H, N, D] (dense rows), into labels int32 [B, H, N]."""
    batch, heads, num_tokens, width = x.shape
    num_padded = prepared.rows.shape[1]
    config = tuned("kmeans_assign", x.device, x.dtype, width, num_tokens)
    num_tiles = num_padded // config["BLOCK_C"]
    grid = (triton.cdiv(num_tokens, config["BLOCK_N"]), batch * heads)
    _assign[grid](
        *(x, *prepared, labels, num_tokens, num_clusters, num_padded, heads, *row_strides(x)),
        **{"WIDTH": width, "BLOCK_D": padded(width)},
        **{"TILE_BITS": (num_tiles - 1).bit_length(), **config},
    )
