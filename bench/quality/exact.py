"""What the exact attention says: the softmax mass of every block, and the best that any selection could do.

The probabilities [queries, keys] exist for a chunk of queries of one head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.quality.capture import Attention
from bench.quality.clusters import Clustering

__all__ = ["best_blocks", "block_mass", "exact_rows", "recall", "sampled_rows", "token_recall"]

_CHUNK = 512


def _probabilities(attention: Attention, head: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of queries (indices) and their exact attention over all keys, float32 [queries, N]."""
    query, key = attention.query[0, head], attention.key[0, head]
    rows = torch.arange(query.shape[0]) if rows is None else rows
    for chunk in rows.split(_CHUNK):
        yield chunk, torch.softmax((query[chunk] * attention.scale) @ key.T, dim=-1)


def sampled_rows(attention: Attention, samples: int) -> Tensor:
    """About ``samples`` evenly spaced tokens of an attention, int64."""
    num_tokens = attention.query.shape[2]
    return torch.arange(0, num_tokens, max(1, num_tokens // samples))


def block_mass(attention: Attention, clusterings: Sequence[Clustering], rows: Tensor | None = None) -> list[Tensor]:
    """Exact attention from each query cluster to each key cluster, float64 [H, Cq, Ck], for every clustering.

    Summed over keys and averaged over queries: all of it together is 1 per head. ``rows``: these queries only.
    """
    heads, num_tokens = attention.query.shape[1:3]
    count = num_tokens if rows is None else rows.shape[0]
    masses = [
        c.query.sizes.new_zeros(heads, c.query.sizes.shape[2], c.key.sizes.shape[2]).double() for c in clusterings
    ]
    widths = [c.key.sizes.shape[2] for c in clusterings]
    for head in range(heads):
        labels = [c.key.labels[0, head].long() for c in clusterings]
        members = torch.cat(
            [torch.nn.functional.one_hot(x, width).float() for x, width in zip(labels, widths, strict=True)], dim=1
        )
        for chunk, probabilities in _probabilities(attention, head, rows):
            parts = (probabilities @ members).double().split(widths, dim=1)
            for mass, clustering, part in zip(masses, clusterings, parts, strict=True):
                mass[head].index_add_(0, clustering.query.labels[0, head, chunk].long(), part)
    return [mass / count for mass in masses]


def recall(mass: Tensor, block_map: Tensor) -> float:
    """Exact softmax mass on the selected blocks, averaged over queries and heads."""
    clusters = block_map[0, :, : mass.shape[1], : mass.shape[2]]
    return float((mass * clusters).sum(dim=(1, 2)).mean())


def best_blocks(mass: Tensor, clustering: Clustering, density: float) -> Tensor:
    """The block map of one who knows the mass of every block: the most mass per key first, under the usual budget.

    The cluster that crosses the budget is kept, as by ``ops.select_blocks``.
    """
    sizes = clustering.key.sizes[0].double().unsqueeze(1).expand_as(mass)
    priority = torch.where(sizes > 0, mass / sizes.clamp(min=1), -1.0)
    order = priority.argsort(dim=-1, descending=True, stable=True)
    cost = sizes.gather(-1, order)
    kept_in_order = cost.cumsum(dim=-1) - cost < density * sizes.sum(dim=-1, keepdim=True)
    kept = torch.zeros_like(kept_in_order).scatter_(-1, order, kept_in_order)
    return torch.nn.functional.pad(kept, (0, 2, 0, 2)).unsqueeze(0)


def token_recall(attention: Attention, densities: Sequence[float], samples: int = 256) -> list[float]:
    """Recall if every query had the keys that it attends to most: no blocks, nothing estimated.

    Averaged over ``samples`` evenly spaced queries per head. It bounds every selection of the same density per query,
    and tells how concentrated the attention is.
    """
    heads, num_tokens = attention.query.shape[1:3]
    rows = sampled_rows(attention, samples)
    last = torch.tensor([math.ceil(density * num_tokens) - 1 for density in densities])
    total = torch.zeros(len(densities), dtype=torch.float64)
    for head in range(heads):
        for _, probabilities in _probabilities(attention, head, rows):
            sums = probabilities.sort(dim=-1, descending=True).values.double().cumsum(dim=-1)
            total += sums[:, last].sum(dim=0)
    return [float(value) for value in total / (heads * rows.shape[0])]


def exact_rows(attention: Attention, rows: Tensor) -> Tensor:
    """Dense attention of some queries in float64: [1, H, len(rows), D]."""
    query, key, value = (x.double() for x in (attention.query[:, :, rows], attention.key, attention.value))
    return torch.softmax(query @ key.transpose(-1, -2) * attention.scale, dim=-1) @ value
