"""What error-aware routing is worth, by the error that it ranks blocks with.

"score" knows the softmax mass only. "squares" is the published estimate (SVG-EAR, arXiv 2603.08982): for the query
cluster's centroid, the sum over a cluster's keys of the squared error that each makes alone. Within a cluster these
errors largely cancel, since the centroid is the keys' mean: "error", what this package does, squares their sum.
"oracle" knows it for a sample of the real queries instead of the centroid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.quality.capture import Attention
from bench.quality.clusters import Budget, Clustering, SparseAttention
from bench.quality.counts import DENSITIES, SHOWN
from bench.quality.exact import best_blocks
from bench.quality.measure import average, interpolate, relative_error

__all__ = ["RoutingStudy", "compensation_errors"]

SAMPLED_QUERIES = 1024
_CHUNK = 512


def compensation_errors(sparse: SparseAttention, head: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """What compensating a key cluster, instead of attending to it, changes in the output of queries [m, D] of a head.

    Returns, float64 [m, Ck] each: |change|^2 to first order, and the sum over the cluster's keys of |change by this
    key alone|^2.
    """
    clusters = sparse.clustering.key
    scale = sparse.attention.scale
    key, value, k_mean, v_mean = (
        x[0, head].double() for x in (sparse.key, sparse.value, clusters.centroids, sparse.v_centroids)
    )
    scores = queries.double() @ key.T * scale
    log_sum = scores.logsumexp(dim=1, keepdim=True)
    exact, mean = torch.exp(scores - log_sum), torch.exp(queries.double() @ k_mean.T * scale - log_sum)
    mass = mean * clusters.sizes[0, head]
    output = mass @ v_mean / mass.sum(dim=1, keepdim=True)
    total, squares = torch.empty_like(mean), torch.empty_like(mean)
    bounds = clusters.offsets[0, head].tolist()
    for j in range(mean.shape[1]):
        values, weights = value[bounds[j] : bounds[j + 1]], exact[:, bounds[j] : bounds[j + 1]]
        excess = weights - mean[:, j : j + 1]
        change = excess @ values - excess.sum(dim=1, keepdim=True) * output
        total[:, j] = change.square().sum(dim=1)
        # |a v - b w|^2 = a^2 v.v - 2 a b v.w + b^2 w.w
        parts = weights.square() * values.square().sum(1) - 2 * weights * mean[:, j : j + 1] * (values @ v_mean[j])
        squares[:, j] = parts.sum(dim=1) + values.shape[0] * mean[:, j].square() * v_mean[j].square().sum()
    return total, squares


class RoutingStudy:
    """Measures the output error of attentions whose blocks are selected by each estimate, at equal density."""

    def __init__(self) -> None:
        self._measured: dict[str, list[dict[str, float]]] = {}

    def add(self, attention: Attention, clustering: Clustering) -> None:
        """Measure one attention."""
        sparse = SparseAttention(attention, clustering)
        squares, oracle = self._estimates(attention, sparse)
        maps = {
            "score": [sparse.select(Budget(density)) for density in DENSITIES],
            "squares": [best_blocks(squares, clustering, density) for density in DENSITIES],
            "error": [sparse.select(Budget(density), by_error=True) for density in DENSITIES],
            "oracle": [best_blocks(oracle, clustering, density) for density in DENSITIES],
        }
        for name, block_maps in maps.items():
            curve = {
                "density": [sparse.density(block_map) for block_map in block_maps],
                "error": [relative_error(sparse.attend(m, compensation=True), attention.dense) for m in block_maps],
            }
            errors = {f"error at {density:.0%}": interpolate(curve, "error", density) for density in SHOWN}
            self._measured.setdefault(name, []).append(errors)

    @staticmethod
    def _estimates(attention: Attention, sparse: SparseAttention) -> tuple[Tensor, Tensor]:
        """The published estimate of the centroids, and the error summed over sampled queries: [H, Cq, Ck] each."""
        query = sparse.clustering.query
        heads, num_tokens = attention.query.shape[1:3]
        # At random: evenly spaced tokens share columns of the frame, and clusters without a sample would be guessed.
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(num_tokens, generator=generator)[:SAMPLED_QUERIES]
        squares, oracle = [], []
        for head in range(heads):
            squares.append(compensation_errors(sparse, head, query.centroids[0, head])[1])
            summed = torch.zeros_like(squares[-1])
            for chunk in rows.split(_CHUNK):
                errors, _ = compensation_errors(sparse, head, attention.query[0, head, chunk])
                summed.index_add_(0, query.labels[0, head, chunk].long(), errors)
            oracle.append(summed)
        return torch.stack(squares), torch.stack(oracle)

    def results(self) -> list[dict[str, Any]]:
        """A row per estimate, averaged over what was added."""
        return [{"ranked_by": name, **average(measured)} for name, measured in self._measured.items()]
