"""One budget for all heads of a layer on the GPU: no sort, and nothing is read back.

The threshold at which the budget is reached is found four bits at a time: one pass adds up, row by row, the pairs of
each of the 16 values that the next four bits may have, among blocks that agree in those before. Pairs are counted in
integers, so that the same input gives the same map. Eight passes over [heads, query clusters, key clusters] fix all 32
bits; blocks that share them all are ties, and go by index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of
from svg2_compile.kernels.triton.members import squared_shares
from svg2_compile.kernels.triton.primitives import sortable

__all__ = ["select_blocks_of_layer"]

MAX_LOG_BOOST = 8.0
DIGIT_BITS = 4
DIGITS = tl.constexpr(16)


@triton.jit
def _pairs_of_row(priority, q_sizes, k_sizes, row, kv_row, num_k_clusters, column, present):
    """Sortable priorities int64 [n] of one row, and the pairs int64 [n] of its blocks; 0 where none may be taken."""
    value = tl.load(priority + row * num_k_clusters + column, mask=present, other=float("-inf"))
    size = tl.load(k_sizes + kv_row * num_k_clusters + column, mask=present, other=0).to(tl.int64)
    pairs = tl.where(value > float("-inf"), size * tl.load(q_sizes + row).to(tl.int64), 0)
    return sortable(value), pairs


@triton.jit(do_not_specialize=["rows_per_item", "num_q_clusters", "num_k_clusters", "shift"])
def _count_digits(
    priority, q_sizes, k_sizes, prefix, counts, rows_per_item, num_q_clusters, sharing, num_k_clusters, shift,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """counts int64 [rows, 16]: pairs by the four bits from ``shift`` on, of one row's blocks that agree in the bits
    above with the prefix int64 [B] of their batch item."""
    row = tl.program_id(0).to(tl.int64)
    kv_row = row // (num_q_clusters * sharing)
    column = tl.arange(0, BLOCK)
    key, pairs = _pairs_of_row(
        priority, q_sizes, k_sizes, row, kv_row, num_k_clusters, column, column < num_k_clusters
    )  # fmt: skip
    agrees = (key >> (shift + 4)) == tl.load(prefix + row // rows_per_item)
    pairs = tl.where(agrees, pairs, 0)
    digit = (key >> shift) & 15
    for value in tl.static_range(16):
        tl.store(counts + row * DIGITS + value, tl.sum(tl.where(digit == value, pairs, 0), 0))


@triton.jit(do_not_specialize=["rows_per_item", "num_q_clusters", "num_k_clusters"])
def _write_map(
    priority, q_sizes, k_sizes, threshold, ties_before, left, broken, everything, block_map,
    rows_per_item, num_q_clusters, sharing, num_k_clusters, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the block map: a query cluster's, the context row or the null row."""
    line, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    present = column < num_k_clusters
    row = group * num_q_clusters + tl.minimum(line, num_q_clusters - 1)
    kv_row = group // sharing
    key, pairs = _pairs_of_row(priority, q_sizes, k_sizes, row, kv_row, num_k_clusters, column, present)
    item = row // rows_per_item
    low = tl.load(threshold + item)
    tied = key == low
    tie_pairs = tl.where(tied, pairs, 0)
    before = tl.load(ties_before + row) + tl.cumsum(tie_pairs, 0) - tie_pairs
    kept = (pairs > 0) & ((key > low) | (tied & (before < tl.load(left + item))))
    filled = tl.load(k_sizes + kv_row * num_k_clusters + column, mask=present, other=0) > 0
    kept = kept | (filled & (tl.load(broken + row) != 0))
    kept = kept | (present & (tl.load(everything) != 0))
    keep = (kept & (line < num_q_clusters)) | (present & (line == num_q_clusters)) | (column == num_k_clusters)
    keep = keep & ~((line == num_q_clusters + 1) & (column != num_k_clusters))
    width = num_k_clusters + 2
    place = (group * (num_q_clusters + 2) + line) * width + column
    tl.store(block_map + place, keep.to(tl.int8), mask=column < width)


def _log_boosts(log_mass: Tensor, q_variances: Tensor, keys: Tensor, empty: Tensor, scale: float) -> Tensor:
    """min(8, u_ij / 2), u_ij = s^2 sum_d var_id (c_jd - cbar_id)^2: [B, Hq, Cq, Ck].

    Squares are multiplied out, of keys about their mean: then little cancels.
    """
    empty_keys = empty.transpose(-1, -2)
    keys = keys.masked_fill(empty_keys, 0.0)
    filled = empty_keys.logical_not().sum(dim=2, keepdim=True).clamp(min=1)
    keys = (keys - keys.sum(dim=2, keepdim=True) / filled).masked_fill(empty_keys, 0.0)
    mean_key = torch.softmax(log_mass.narrow(-1, 0, keys.shape[2]), dim=-1) @ keys
    weighted = q_variances * mean_key
    boost = q_variances @ keys.square().transpose(-1, -2) - 2 * (weighted @ keys.transpose(-1, -2))
    boost = (boost + (weighted * mean_key).sum(dim=-1, keepdim=True)) * (0.5 * scale * scale)
    return boost.clamp(min=0.0, max=MAX_LOG_BOOST)


def select_blocks_of_layer(
    log_mass: Tensor,
    log_error: Tensor,
    q_variances: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_offsets: Tensor,
    scale: float,
    density: Tensor,
    far_members: Tensor | None = None,
) -> Tensor:
    """The blocks of most error per pair over all heads of a batch item; see ``ops.select_blocks_of_layer``."""
    batch, q_heads, num_q_clusters, num_k_clusters = log_error.shape
    block_map = log_error.new_empty((batch, q_heads, num_q_clusters + 2, num_k_clusters + 2), dtype=torch.bool)
    if block_map.shape[0] * block_map.shape[1] == 0:
        return block_map
    sharing = q_heads // k_centroids.shape[1]
    k_sizes = k_offsets.narrow(-1, 0, num_k_clusters + 1).diff(dim=-1)
    of_query_heads = k_sizes.repeat_interleave(sharing, dim=1).unsqueeze(2)
    empty = of_query_heads == 0
    unknown = log_error.isnan() | log_mass.narrow(-1, 0, num_k_clusters).isfinite().logical_not()
    broken = (unknown & (of_query_heads > 0)).any(dim=-1)
    total = log_mass.logsumexp(dim=-1, keepdim=True)
    boost = _log_boosts(log_mass, q_variances, k_centroids.repeat_interleave(sharing, dim=1), empty, scale)
    if far_members is not None:
        squares = squared_shares(log_mass, far_members, k_centroids, k_sizes, q_sizes, scale)
        squares = (squares / q_sizes.clamp(min=1).unsqueeze(-1)).log()
        boost = torch.logaddexp(boost, squares - 2 * (log_mass.narrow(-1, 0, num_k_clusters) - total))
    priority = log_error + boost - of_query_heads.log() - 2 * total
    priority = priority.masked_fill(broken.unsqueeze(-1) | empty, float("-inf")).contiguous()
    shares = q_sizes.masked_fill(broken, 0).double().sum(dim=-1) * of_query_heads.squeeze(2).double().sum(dim=-1)
    budget = shares.sum(dim=1) * density.double()
    everything = (density >= 1).to(torch.int8).view(1)
    with device_of(log_error):
        sizes = (q_sizes.contiguous(), k_sizes)
        counts = (q_heads * num_q_clusters, num_q_clusters, sharing, num_k_clusters)
        threshold, ties_before, left = _find_threshold(priority, *sizes, budget, counts)
        _write_map[num_q_clusters + 2, batch * q_heads](
            *(priority, *sizes, threshold, ties_before, left, broken.to(torch.int8), everything),
            *(block_map.view(torch.int8), *counts),
            **_launch(num_k_clusters + 2),
        )
    return block_map


def _launch(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def _find_threshold(
    priority: Tensor, q_sizes: Tensor, k_sizes: Tensor, budget: Tensor, counts: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sortable priority int64 [B] at which the budget float64 [B] is reached, the pairs int64 [B, rows] of its ties
    in the rows before each row, and what is left of the budget for them, int64 [B], rounded up."""
    batch, rows = priority.shape[0], counts[0]
    prefix = priority.new_zeros(batch, dtype=torch.int64)
    above = torch.zeros_like(prefix)
    digits = priority.new_empty((batch, rows, DIGITS.value), dtype=torch.int64)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        _count_digits[(batch * rows,)](
            *(priority, q_sizes, k_sizes, prefix, digits, *counts, shift), **_launch(counts[3])
        )
        pairs = digits.sum(dim=1)
        reached = above.unsqueeze(1) + pairs.flip(1).cumsum(1).flip(1)  # by blocks of at least each digit
        # The largest digit by which the budget is reached; 0 where it never is.
        digit = ((reached.double() >= budget.unsqueeze(1)).sum(dim=1, keepdim=True) - 1).clamp(min=0)
        above = (reached - pairs).gather(1, digit).squeeze(1)
        prefix = prefix * DIGITS.value + digit.squeeze(1)
    ties = digits.gather(2, digit.unsqueeze(1).expand(-1, rows, -1)).squeeze(2)
    return prefix, ties.cumsum(dim=1) - ties, (budget - above).ceil().to(torch.int64)
