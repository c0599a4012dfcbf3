"""One self-attention, as benchmarks describe it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS

__all__ = ["Shape", "default_shape"]


@dataclass(frozen=True)
class Shape:
    """One self-attention [1, num_heads, num_tokens, head_dim] of a model.

    video_tokens are clustered; context_tokens (text) stand behind them. num_q_clusters, num_k_clusters: as published,
    or as the compiler would choose. spread: the standard deviation of the logits between centroids that
    ``clustered_inputs`` aims at.
    """

    name: str
    num_heads: int
    video_tokens: int
    context_tokens: int
    head_dim: int
    num_q_clusters: int
    num_k_clusters: int
    spread: float
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_tokens(self) -> int:
        return self.video_tokens + self.context_tokens

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def flops(self, density: float = 1.0) -> float:
        """Floating-point operations of both matrix products over ``density`` of all (query, key) pairs."""
        return 4.0 * self.num_heads * density * self.num_tokens**2 * self.head_dim


def default_shape(
    name: str, num_heads: int, num_tokens: int, head_dim: int, spread: float, dtype: torch.dtype = torch.bfloat16
) -> Shape:
    """A shape of video tokens alone, with the numbers of clusters that the compiler chooses."""
    counts = QUERY_CLUSTERS.count(num_tokens), KEY_CLUSTERS.count(num_tokens)
    return Shape(name, num_heads, num_tokens, 0, head_dim, *counts, spread, dtype)
