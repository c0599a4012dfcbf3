"""Means of clusters: sums over the rows of a segment, in float32 and in a fixed order, so without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of, padded, row_strides, rows_dense
from svg2_compile.kernels.triton.primitives import head_base, load_rows

__all__ = [
    "ROWS_PER_STEP",
    "away_from",
    "centroid_and_rows",
    "cluster_means",
    "cluster_variances",
    "sum_segment",
]

ROWS_PER_STEP = 32


@triton.jit
def sum_segment(
    head, order, begin, end, stride_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Sum of the head's rows [begin, end), or of rows order[begin:end]: float32 [BLOCK_D]."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        present = row < end
        if HAS_ORDER:
            token = tl.load(order + row, mask=present, other=0)
        else:
            token = row
        total += load_rows(head, token, present, stride_n, WIDTH, BLOCK_D).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_clusters"])
def _cluster_means(
    x, offsets, means, num_heads, num_clusters, x_b, x_h, x_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means [groups, C, WIDTH] of the rows between two offsets; zero where there are none."""
    cluster, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    boundary = offsets + group * (num_clusters + 3) + cluster
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    x += head_base(group, num_heads, x_b, x_h)
    total = sum_segment(x, offsets, begin, end, x_n, ROWS, WIDTH, BLOCK_D, False)
    column = tl.arange(0, BLOCK_D)
    mean = total / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(means + (group * num_clusters + cluster) * WIDTH + column, mean, mask=column < WIDTH)


def cluster_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean row of each cluster of permuted rows; see ``ops.cluster_means``."""
    batch, heads, num_tokens, width = x.shape
    num_clusters = offsets.shape[2] - 3
    means = x.new_empty(batch, heads, num_clusters, width, dtype=torch.float32)
    if means.numel() == 0:
        return means
    if num_tokens == 0:
        return means.zero_()
    x, offsets = rows_dense(x), offsets.contiguous()
    with device_of(x):
        _cluster_means[num_clusters, batch * heads](
            *(x, offsets, means, heads, num_clusters, *row_strides(x)),
            **{"ROWS": ROWS_PER_STEP, "WIDTH": width, "BLOCK_D": padded(width), "num_warps": 4},
        )
    return means


@triton.jit
def centroid_and_rows(
    offsets, centroids, cluster, group, num_clusters, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The centroid float32 [BLOCK_D] of a cluster, and the positions at which its rows begin and end."""
    boundary = offsets + group * (num_clusters + 3) + cluster
    column = tl.arange(0, BLOCK_D)
    place = (group * num_clusters + cluster) * WIDTH + column
    mean = tl.load(centroids + place, mask=column < WIDTH, other=0.0)
    return mean, tl.load(boundary), tl.load(boundary + 1)


@triton.jit
def away_from(mean, head, order, row, end, stride_n, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the head's rows order[row] differ by from the mean, float32 [rows, BLOCK_D]; 0 from ``end`` on."""
    present = row < end
    token = tl.load(order + row, mask=present, other=0)
    away = load_rows(head, token, present, stride_n, WIDTH, BLOCK_D).to(tl.float32) - mean[None, :]
    return tl.where(present[:, None], away, 0.0)


@triton.jit(do_not_specialize=["num_clusters", "num_tokens"])
def _cluster_variances(
    x, order, offsets, centroids, variances, num_heads, num_clusters, num_tokens, x_b, x_h, x_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """variances [groups, C, WIDTH] of the rows that the order puts between two offsets; zero where there are none."""
    cluster, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mean, begin, end = centroid_and_rows(offsets, centroids, cluster, group, num_clusters, WIDTH, BLOCK_D)
    x += head_base(group, num_heads, x_b, x_h)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        away = away_from(mean, x, order + group * num_tokens, row, end, x_n, WIDTH, BLOCK_D)
        total += away * away
    variance = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    column = tl.arange(0, BLOCK_D)
    tl.store(variances + (group * num_clusters + cluster) * WIDTH + column, variance, mask=column < WIDTH)


def cluster_variances(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor) -> Tensor:
    """Mean square of the members' distance to their centroid, per dimension; see ``ops.cluster_variances``."""
    batch, heads, num_tokens, width = x.shape
    variances = torch.empty_like(centroids, memory_format=torch.contiguous_format)
    if variances.numel() == 0 or num_tokens == 0:
        return variances.zero_()
    x = rows_dense(x)
    with device_of(x):
        _cluster_variances[centroids.shape[2], batch * heads](
            *(x, order.contiguous(), offsets.contiguous(), centroids.contiguous(), variances),
            *(heads, centroids.shape[2], num_tokens, *row_strides(x)),
            **{"ROWS": ROWS_PER_STEP, "WIDTH": width, "BLOCK_D": padded(width), "num_warps": 4},
        )
    return variances
