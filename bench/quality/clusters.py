"""The rewritten attention in pieces that can be measured one by one: clustering, selection, attention.

Every piece calls the ``svg2::`` operators that the compiler puts into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.quality.capture import Attention
from bench.quality.position import Grid, position_blocks
from svg2_compile.kernels import ops

__all__ = ["Budget", "Clustering", "Side", "SparseAttention", "cluster", "cluster_by_position", "keep_labels"]


@dataclass(frozen=True)
class Side:
    """Clusters of the queries or of the keys of one attention: the results of ``kmeans`` and ``cluster_order``."""

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, labels: Tensor, centroids: Tensor, sizes: Tensor) -> Side:
        return cls(labels, centroids, sizes, *ops.cluster_order(labels, sizes.shape[2], 0, labels.shape[2]))


@dataclass(frozen=True)
class Clustering:
    """Both sides of one attention."""

    query: Side
    key: Side


@dataclass(frozen=True)
class Budget:
    """How much of the attention is computed: a fixed density, or blocks until their estimated mass is ``top_p``."""

    density: float | None = None
    top_p: float = 0.9
    min_k_ratio: float = 0.0

    @property
    def limits(self) -> tuple[float, float, float | None]:
        return self.top_p, self.min_k_ratio, self.density


def cluster(attention: Attention, counts: tuple[int, int], iters: int, start: Clustering | None = None) -> Clustering:
    """k-means of queries and keys into ``counts`` clusters: from the centroids of ``start``, or cold."""

    def side(x: Tensor, count: int, warm: Side | None) -> Side:
        seeds = x.new_zeros(x.shape[0], x.shape[1], count, x.shape[3]) if warm is None else warm.centroids
        return Side.of(*ops.kmeans(x, seeds, torch.tensor(warm is not None), iters))

    warm_query, warm_key = (None, None) if start is None else (start.query, start.key)
    return Clustering(side(attention.query, counts[0], warm_query), side(attention.key, counts[1], warm_key))


def cluster_by_position(attention: Attention, counts: tuple[int, int], kind: str, grid: Grid) -> Clustering:
    """``counts`` blocks of positions for queries and keys."""
    with position_blocks(kind, grid):
        return cluster(attention, counts, 1)


def keep_labels(attention: Attention, before: Clustering) -> Clustering:
    """No k-means at all: the labels of an earlier step, with the means that they have now."""

    def side(x: Tensor, old: Side) -> Side:
        means = ops.cluster_means(ops.permute_tokens(x, old.order), old.offsets)
        return Side(old.labels, means, old.sizes, old.order, old.offsets)

    return Clustering(side(attention.query, before.query), side(attention.key, before.key))


class SparseAttention:
    """One attention over one clustering: keys and values are permuted once, for every budget and variant."""

    def __init__(self, attention: Attention, clustering: Clustering) -> None:
        self.attention, self.clustering = attention, clustering
        self.key = ops.permute_tokens(attention.key, clustering.key.order)
        self.value = ops.permute_tokens(attention.value, clustering.key.order)
        self.v_centroids = ops.cluster_means(self.value, clustering.key.offsets)

    def select(self, budget: Budget, by_error: bool = False) -> Tensor:
        """The block map, bool [1, H, Cq + 2, Ck + 2], by estimated mass or by the error of compensation."""
        query, key = self.clustering.query, self.clustering.key
        scale = self.attention.scale
        if by_error:
            means = (query.centroids, key.centroids, self.v_centroids, query.sizes)
            return ops.select_blocks_by_error(self.key, self.value, key.offsets, *means, scale, *budget.limits)
        return ops.select_blocks(query.centroids, key.centroids, query.sizes, key.sizes, scale, *budget.limits)

    def attend(self, block_map: Tensor, compensation: bool = False) -> Tensor:
        """The attention over the selected blocks, [1, H, N, D] in token order."""
        query, key = self.clustering.query, self.clustering.key
        means: tuple[Any, Any] = (key.centroids, self.v_centroids) if compensation else (None, None)
        tokens = (self.attention.query, self.key, self.value)
        scale = self.attention.scale
        out, _ = ops.block_sparse_attention(*tokens, query.offsets, key.offsets, block_map, scale, *means, query.order)
        return out

    def density(self, block_map: Tensor) -> float:
        """Selected pairs over all pairs, mean over heads."""
        return float(ops.block_density(self.clustering.query.offsets, self.clustering.key.offsets, block_map).mean())
