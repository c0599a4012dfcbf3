"""Counting sort of tokens by block: stable, without atomics, four launches.

A tile of tokens is counted (``count_blocks``), the counts of each block are summed over the tiles before
(``sum_over_tiles``), blocks get their places (``place_blocks``), and every token finds its own from the three: the
start of its block, the tokens of that block in earlier tiles, and those before it in its own tile (``scatter_tokens``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of

__all__ = ["cluster_order", "counting_sort"]

TOKENS_PER_TILE = 512
TOKENS_PER_STEP = 64  # ranks come from comparing 64 x 64 tokens at a time: more would not fit into registers
BINS_PER_PROGRAM = 64
LEAST_BINS = 128  # tl.histogram wants a bin for every thread of a program
TILES_PER_STEP = 16
# Integers that no address alignment depends on: one compiled kernel serves all their values.
COUNTS = ["num_tokens", "start", "num_video", "num_clusters"]


@triton.jit
def _block_of_token(
    labels, valid, token, num_tokens, start, num_video, num_clusters, HAS_VALID: tl.constexpr, PAD: tl.constexpr
):
    """Block of each token [n]: its label inside the video, else context; null where masked; PAD past the end."""
    inside = (token >= start) & (token < start + num_video)
    label = tl.load(labels + token - start, mask=inside, other=0)
    block = tl.where(inside, tl.minimum(tl.maximum(label, 0), num_clusters - 1), num_clusters)
    if HAS_VALID:
        is_valid = tl.load(valid + token, mask=token < num_tokens, other=1)
        block = tl.where(is_valid != 0, block, num_clusters + 1)
    return tl.where(token < num_tokens, block, PAD)


@triton.jit(do_not_specialize=COUNTS)
def _count_blocks(
    labels, valid, counts, num_tokens, start, num_video, num_clusters, num_heads, valid_stride_b, valid_stride_h,
    TILE: tl.constexpr, BINS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Tokens of each block in one tile: counts int32 [groups, tiles, BINS]."""
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    valid += (group // num_heads) * valid_stride_b + (group % num_heads) * valid_stride_h
    token = tile * TILE + tl.arange(0, TILE)
    block = _block_of_token(
        labels + group * num_video, valid, token, num_tokens, start, num_video, num_clusters, HAS_VALID, BINS - 1
    )
    row = group * tl.num_programs(0) + tile
    tl.store(counts + row * BINS + tl.arange(0, BINS), tl.histogram(block, BINS))


@triton.jit(do_not_specialize=["num_tiles"])
def _sum_over_tiles(
    counts, totals, num_tiles, BINS: tl.constexpr, BINS_HERE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """In place: counts[tile] becomes the sum over the tiles before it. totals int32 [groups, BINS]."""
    group = tl.program_id(1).to(tl.int64)
    bins = tl.program_id(0) * BINS_HERE + tl.arange(0, BINS_HERE)
    before = tl.zeros([BINS_HERE], tl.int32)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        pointers = counts + (group * num_tiles + tile)[:, None] * BINS + bins[None, :]
        mask = (tile < num_tiles)[:, None] & (bins < BINS)[None, :]
        count = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, before[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        before += tl.sum(count, 0)
    tl.store(totals + group * BINS + bins, before, mask=bins < BINS)


@triton.jit(do_not_specialize=["num_boundaries"])
def _place_blocks(totals, offsets, num_boundaries, BINS: tl.constexpr):
    """offsets int32 [groups, boundaries]: exclusive sums of the block sizes."""
    group = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + group * BINS + bins)
    starts = tl.cumsum(total, 0) - total
    tl.store(offsets + group * num_boundaries + bins, starts, mask=bins < num_boundaries)


@triton.jit(do_not_specialize=COUNTS)
def _scatter_tokens(
    labels, valid, counts, offsets, order, num_tokens, start, num_video, num_clusters, num_heads,
    valid_stride_b, valid_stride_h,
    TILE: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """order[place of token] = token, for the tokens of one tile."""
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    valid += (group // num_heads) * valid_stride_b + (group % num_heads) * valid_stride_h
    labels += group * num_video
    counts += (group * tl.num_programs(0) + tile) * BINS
    offsets += group * (num_clusters + 3)
    for this in range(0, TILE, STEP):
        token = tile * TILE + this + tl.arange(0, STEP)
        block = _block_of_token(labels, valid, token, num_tokens, start, num_video, num_clusters, HAS_VALID, BINS - 1)
        rank = tl.zeros([STEP], tl.int32)
        for other in range(0, this + STEP, STEP):
            earlier = tile * TILE + other + tl.arange(0, STEP)
            earlier_block = _block_of_token(
                labels, valid, earlier, num_tokens, start, num_video, num_clusters, HAS_VALID, BINS - 1
            )
            same = (block[:, None] == earlier_block[None, :]) & (earlier[None, :] < token[:, None])
            rank += tl.sum(same.to(tl.int32), 1)
        present = token < num_tokens
        place = tl.load(offsets + block, mask=present, other=0) + tl.load(counts + block, mask=present, other=0)
        tl.store(order + group * num_tokens + place + rank, token, mask=present)


def counting_sort(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """order int32 [B, H, num_tokens] and offsets int32 [B, H, C + 3]; arguments as in ``ops.cluster_order``."""
    batch, heads, num_video = labels.shape
    order = labels.new_empty(batch, heads, num_tokens)
    offsets = labels.new_empty(batch, heads, num_clusters + 3)
    groups = batch * heads
    if groups == 0 or num_tokens == 0:
        return order, offsets.zero_()
    labels = labels.contiguous()
    mask = labels if valid is None else valid.contiguous().view(torch.uint8)
    mask_strides = (0, 0) if valid is None else (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
    bins = max(LEAST_BINS, triton.next_power_of_2(num_clusters + 3))
    num_tiles = triton.cdiv(num_tokens, TOKENS_PER_TILE)
    counts = labels.new_empty(groups, num_tiles, bins)
    totals = labels.new_empty(groups, bins)
    shape = (num_tokens, start, num_video, num_clusters, heads, *mask_strides)
    bins_here = min(bins, BINS_PER_PROGRAM)
    options = {"TILE": TOKENS_PER_TILE, "BINS": bins, "HAS_VALID": valid is not None}
    with device_of(labels):
        _count_blocks[num_tiles, groups](labels, mask, counts, *shape, **options, num_warps=4)
        _sum_over_tiles[triton.cdiv(bins, bins_here), groups](
            counts, totals, num_tiles, BINS=bins, BINS_HERE=bins_here, TILES=TILES_PER_STEP, num_warps=4
        )
        _place_blocks[(groups,)](totals, offsets, num_clusters + 3, BINS=bins, num_warps=4)
        _scatter_tokens[num_tiles, groups](
            labels, mask, counts, offsets, order, *shape, **options, STEP=TOKENS_PER_STEP, num_warps=4
        )
    return order, offsets


def cluster_order(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stable order of tokens by block; see ``ops.cluster_order``. A label out of range counts as the nearest one."""
    return counting_sort(labels, num_clusters, start, num_tokens, valid)
