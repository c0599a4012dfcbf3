"""Members of a query cluster that are far from its centroid: which those are, and how sharply they attend.

What a centroid and the variance around it say of a block is wrong for single members that attend to it sharply. The
farthest few are looked at one by one, against the mean keys: two passes over these, first for the sum of exponentials
and then for the squares of the shares, so that nothing of size [members, key clusters] is in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of, padded, row_strides, rows_dense
from svg2_compile.kernels.triton.means import ROWS_PER_STEP, away_from, centroid_and_rows
from svg2_compile.kernels.triton.primitives import LOG2_E, head_base, load_rows

__all__ = ["farthest_members", "squared_shares"]

KEYS = 32  # in a tile, loaded one after the other: so 256 dimensions in three products each stay in registers
LAST_POSITION = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["num_clusters", "num_tokens"])
def _squared_distances(
    x, order, offsets, centroids, distances, num_heads, num_clusters, num_tokens, x_b, x_h, x_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """distances [groups, N]: |x - centroid|^2 of the rows of one cluster, at their positions in the order."""
    cluster, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mean, begin, end = centroid_and_rows(offsets, centroids, cluster, group, num_clusters, WIDTH, BLOCK_D)
    x += head_base(group, num_heads, x_b, x_h)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        away = away_from(mean, x, order + group * num_tokens, row, end, x_n, WIDTH, BLOCK_D)
        tl.store(distances + group * num_tokens + row, tl.sum(away * away, 1), mask=row < end)


@triton.jit(do_not_specialize=["num_clusters", "num_tokens"])
def _pick_farthest(
    x, order, offsets, centroids, distances, farthest, num_heads, num_clusters, num_tokens, x_b, x_h, x_n,
    COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """farthest [groups, C, COUNT, WIDTH] of one cluster: in each round the largest distance below that of the round
    before, of equal ones the first position. Both are one integer: a distance is not negative, so that its bits are in
    its order."""
    cluster, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mean, begin, end = centroid_and_rows(offsets, centroids, cluster, group, num_clusters, WIDTH, BLOCK_D)
    x += head_base(group, num_heads, x_b, x_h)
    column = tl.arange(0, BLOCK_D)
    before = group * 0 + 9223372036854775807
    for rank in range(COUNT):
        largest = tl.full([ROWS], -1, tl.int64)
        for first in range(begin, end, ROWS):
            row = first + tl.arange(0, ROWS)
            distance = tl.load(distances + group * num_tokens + row, mask=row < end, other=0.0)
            key = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (LAST_POSITION - row)
            largest = tl.maximum(largest, tl.where((row < end) & (key < before), key, -1))
        before = tl.max(largest, 0)
        found = before >= 0
        position = LAST_POSITION - (before & 4294967295)
        token = tl.load(order + group * num_tokens + position, mask=found, other=0).to(tl.int64)
        # A width of 0 where there is none, since newer interpreters take no mask joined with a scalar one.
        values = tl.load(x + token * x_n + column, mask=column < WIDTH * found.to(tl.int32), other=0.0).to(tl.float32)
        away = tl.where(found, values - mean, 0.0)
        place = ((group * num_clusters + cluster) * COUNT + rank) * WIDTH + column
        tl.store(farthest + place, away, mask=column < WIDTH)


def farthest_members(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, count: int) -> Tensor:
    """What the members farthest from their centroid differ by; see ``ops.farthest_members``."""
    batch, heads, num_tokens, width = x.shape
    num_clusters = centroids.shape[2]
    farthest = centroids.new_empty(batch, heads, num_clusters, count, width)
    if farthest.numel() == 0 or num_tokens == 0:
        return farthest.zero_()
    x = rows_dense(x)
    distances = centroids.new_empty(batch, heads, num_tokens)
    tokens = (x, order.contiguous(), offsets.contiguous(), centroids.contiguous(), distances)
    sizes = (heads, num_clusters, num_tokens, *row_strides(x))
    block = {"ROWS": ROWS_PER_STEP, "WIDTH": width, "BLOCK_D": padded(width), "num_warps": 4}
    grid = (num_clusters, batch * heads)
    with device_of(x):
        _squared_distances[grid](*tokens, *sizes, **block)
        _pick_farthest[grid](*tokens, farthest, *sizes, COUNT=count, **{**block, "ROWS": 128})
    return farthest


@triton.jit
def _member_logits(
    members, keys, k_sizes, log_mass, kv_group, line, is_line, column, scale_log2, num_k_clusters,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s (q_m - q_i).c_j + ln m_ij in powers of two, float32 [members, KEYS]; -inf for empty clusters and none."""
    present = column < num_k_clusters
    size = tl.load(k_sizes + kv_group * num_k_clusters + column, mask=present, other=0)
    means = load_rows(keys + kv_group * num_k_clusters * WIDTH, column, present & (size > 0), WIDTH, WIDTH, BLOCK_D)
    place = line[:, None] * (num_k_clusters + 2) + column[None, :]
    mass = tl.load(log_mass + place, mask=is_line[:, None] & present[None, :], other=float("-inf"))
    gain = tl.dot(members, tl.trans(means), input_precision=PRECISION) * scale_log2
    return tl.where((size > 0)[None, :], mass * LOG2_E + gain, float("-inf"))


@triton.jit(do_not_specialize=["num_q_clusters", "num_k_clusters"])
def _squared_shares(
    far_members, keys, k_sizes, q_sizes, log_mass, squares, scale_log2, sharing, num_q_clusters, num_k_clusters,
    COUNT: tl.constexpr, PER_CLUSTER: tl.constexpr, CLUSTERS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """squares [groups, Cq, Ck]: sum of P_mj^2 over the members of a few query clusters, PER_CLUSTER rows for each."""
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_group = group // sharing
    row = tl.arange(0, CLUSTERS * PER_CLUSTER)
    cluster, member = tile * CLUSTERS + row // PER_CLUSTER, row % PER_CLUSTER
    is_line = cluster < num_q_clusters
    line = group * num_q_clusters + cluster
    size = tl.load(q_sizes + line, mask=is_line, other=0)
    is_member = is_line & (member < COUNT) & (member < size)
    members = load_rows(far_members, line * COUNT + member, is_member, WIDTH, WIDTH, BLOCK_D)
    context = tl.load(log_mass + line * (num_k_clusters + 2) + num_k_clusters, mask=is_line, other=float("-inf"))
    largest = tl.maximum(context * LOG2_E, -3.0e38)
    total = tl.exp2(context * LOG2_E - largest)
    for first in range(0, num_k_clusters, KEYS):
        column = first + tl.arange(0, KEYS)
        logits = _member_logits(
            members, keys, k_sizes, log_mass, kv_group, line, is_line, column, scale_log2, num_k_clusters,
            WIDTH, BLOCK_D, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(logits - new_largest[:, None]), 1)
        largest = new_largest
    log_total = largest + tl.log2(total)
    own = tl.arange(0, CLUSTERS)
    for first in range(0, num_k_clusters, KEYS):
        column = first + tl.arange(0, KEYS)
        logits = _member_logits(
            members, keys, k_sizes, log_mass, kv_group, line, is_line, column, scale_log2, num_k_clusters,
            WIDTH, BLOCK_D, PRECISION,
        )  # fmt: skip
        share = tl.exp2(logits - log_total[:, None])
        square = tl.where(is_member[:, None], share * share, 0.0)
        square = tl.sum(tl.reshape(square, [CLUSTERS, PER_CLUSTER, KEYS]), 1)
        is_own = (tile * CLUSTERS + own < num_q_clusters)[:, None] & (column < num_k_clusters)[None, :]
        place = (group * num_q_clusters + tile * CLUSTERS + own)[:, None] * num_k_clusters + column[None, :]
        tl.store(squares + place, square, mask=is_own)


def squared_shares(
    log_mass: Tensor, far_members: Tensor, k_centroids: Tensor, k_sizes: Tensor, q_sizes: Tensor, scale: float
) -> Tensor:
    """sum_m P_mj^2 of ``ops.select_blocks_of_layer``: float32 [B, Hq, Cq, Ck], of far_members [B, Hq, Cq, S, D] and
    k_sizes int32 [B, Hkv, Ck]. What is below 10^-38 is lost: nobody attends there."""
    batch, q_heads, num_q_clusters, count, width = far_members.shape
    num_k_clusters = k_centroids.shape[2]
    squares = log_mass.new_empty(batch, q_heads, num_q_clusters, num_k_clusters)
    per_cluster = triton.next_power_of_2(count)
    clusters = max(1, 16 // per_cluster)
    with device_of(log_mass):
        _squared_shares[triton.cdiv(num_q_clusters, clusters), batch * q_heads](
            *(far_members.contiguous(), k_centroids.contiguous(), k_sizes.contiguous(), q_sizes.contiguous()),
            *(log_mass.contiguous(), squares, scale * LOG2_E.value, q_heads // k_centroids.shape[1]),
            *(num_q_clusters, num_k_clusters),
            **{"COUNT": count, "PER_CLUSTER": per_cluster, "CLUSTERS": clusters},
            **{"KEYS": KEYS, "WIDTH": width, "BLOCK_D": padded(width), "num_warps": 4, "num_stages": 1},
            # As exact as float32: the few logits of far members are large.
            PRECISION="ieee" if torch.version.hip is not None else "tf32x3",
        )
    return squares
