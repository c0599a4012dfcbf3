"""The position-blocked baseline: what sparse attention over fixed blocks of neighbouring tokens keeps.

Methods in the style of SpargeAttn group tokens by where they are instead of by what they mean. Here that is one
implementation of the ``svg2::`` operators: the CPU's, but ``kmeans`` returns blocks of positions with their exact means
and sizes. Selection, compensation, routing and attention are the same code for both, so that only the labels differ.

    with position_blocks("tiles", (16, 16, 16)):
        model(...)  # compiled with backend="svg2", before or inside the block
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bench.quality.implementations import implementation
from svg2_compile.kernels.cpu import implementation as cpu

__all__ = ["KINDS", "kmeans", "position_blocks", "position_labels"]

KINDS = ("raster", "tiles")

Grid = tuple[int, int, int]  # frames, height, width, in tokens
_blocks: ContextVar[tuple[str, Grid] | None] = ContextVar("bench_position_blocks", default=None)


def __getattr__(name: str) -> Any:
    """Every other operator is the CPU's."""
    return getattr(cpu, name)


@contextmanager
def position_blocks(kind: str, grid: Grid) -> Iterator[None]:
    """Run every ``svg2::`` operator inside the ``with`` block on the CPU, with position blocks for clusters.

    Args:
        kind: "raster" (runs of consecutive tokens) or "tiles" (boxes of the grid).
        grid: frames, height and width of the video in tokens; tokens are numbered row by row, frame by frame.

    Raises:
        ValueError: for another kind or a grid without tokens; by the operator, where the grid has not the number of
            tokens that is to be clustered.
    """
    if kind not in KINDS:
        raise ValueError(f"position_blocks: kind is {kind!r}; valid: {', '.join(KINDS)}")
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"position_blocks: grid is {grid!r}; valid: frames, height and width, each at least 1")
    token = _blocks.set((kind, grid))
    try:
        with implementation("position", __name__):
            yield
    finally:
        _blocks.reset(token)


def kmeans(
    x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Position blocks in the place of clusters, with the results of ``ops.kmeans``; ``iters`` plays no part."""
    active = _blocks.get()
    if active is None:
        raise RuntimeError("the implementation 'position' runs inside `with position_blocks(kind, grid)` only")
    batch, heads, num_tokens, _ = x.shape
    num_clusters = centroids.shape[2]
    block = position_labels(*active, num_tokens, num_clusters)
    labels = block.to(torch.int64).expand(batch, heads, num_tokens)
    members = torch.ones(1, 1, 1, dtype=torch.bool) if valid is None else valid
    members = members.expand(batch, heads, num_tokens)
    tokens = torch.where(members.unsqueeze(-1), x.to(torch.float32), 0.0)
    sums = torch.zeros_like(centroids, memory_format=torch.contiguous_format)
    sums.scatter_add_(2, labels.unsqueeze(-1).expand_as(tokens), tokens)
    sizes = torch.zeros(batch, heads, num_clusters, dtype=torch.int64).scatter_add_(2, labels, members.long())
    return labels.to(torch.int32), sums / sizes.clamp(min=1).unsqueeze(-1), sizes.to(torch.int32)


# ----------------------------------------------------------------------------------------------------------- the labels
def position_labels(kind: str, grid: Grid, num_tokens: int, num_blocks: int) -> Tensor:
    """Block of every token, int32 [num_tokens]: ``num_blocks`` blocks of nearly equal size, none of them empty.

    Raises ValueError where the grid has not ``num_tokens`` tokens, or fewer than ``num_blocks``.
    """
    if math.prod(grid) != num_tokens:
        raise ValueError(
            f"position blocks: the grid {grid} has {math.prod(grid)} tokens; given {num_tokens} to cluster"
        )
    if not 1 <= num_blocks <= num_tokens:
        raise ValueError(f"position blocks: num_blocks is {num_blocks}; valid: 1 to the {num_tokens} tokens")
    return _raster(num_tokens, num_blocks) if kind == "raster" else _tiles(grid, num_blocks)


@functools.lru_cache(maxsize=64)
def _raster(num_tokens: int, num_blocks: int) -> Tensor:
    return (torch.arange(num_tokens) * num_blocks // num_tokens).to(torch.int32)


@functools.lru_cache(maxsize=64)
def _tiles(grid: Grid, num_blocks: int) -> Tensor:
    labels = torch.zeros(grid, dtype=torch.int32)
    _fill_boxes(labels, num_blocks, 0)
    return labels.flatten()


def _fill_boxes(box: Tensor, num_blocks: int, first: int) -> None:
    """Write the labels first, first + 1, ... of ``num_blocks`` boxes into ``box``, a view of the grid's labels."""
    if num_blocks == 1:
        box.fill_(first)
        return
    axis = max(range(3), key=lambda a: box.shape[a])
    cut, blocks_before = _fairest_cut(box.shape[axis], box.numel() // box.shape[axis], num_blocks)
    _fill_boxes(box.narrow(axis, 0, cut), blocks_before, first)
    _fill_boxes(box.narrow(axis, cut, box.shape[axis] - cut), num_blocks - blocks_before, first + blocks_before)


def _fairest_cut(length: int, area: int, num_blocks: int) -> tuple[int, int]:
    """Where to cut a box of ``length`` slices of ``area`` tokens, and how many of its blocks lie before the cut.

    Among cuts in the middle half, the one after which blocks differ least in size; of several, the most central.
    """
    choices = []
    for cut in range(max(1, length // 4), max(2, length - length // 4 + 1)):
        after = length - cut
        if after < 1:
            continue
        share = round(num_blocks * cut / length)
        # Each side needs a block at least, and a token for each of its blocks.
        blocks = min(max(share, 1, num_blocks - after * area), num_blocks - 1, cut * area)
        sizes = (cut * area / blocks, after * area / (num_blocks - blocks))
        choices.append((max(sizes) / min(sizes), abs(2 * cut - length), cut, blocks))
    *_, cut, blocks = min(choices)
    return cut, blocks
