"""The attention that the compiler puts in place of a dense one, outside any graph: inputs, stages, exact rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS, CountRule

WARM_ITERS = 2  # k-means iterations of every denoising step but the first


@dataclass(frozen=True)
class Case:
    """One measured shape: a self-attention [1, num_heads, num_tokens, head_dim] at a fixed density."""

    num_tokens: int
    head_dim: int
    num_heads: int
    dtype: torch.dtype
    density: float


def clustered_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with the semantic clusters that video attention has.

    Every token belongs to one of N / 200 topics, at random positions (clusters are not neighbourhoods); topic sizes are
    log-normal (sigma 0.7), so that clusters are uneven. A topic has a centre per head; a key's centre is correlated
    (0.7) with its query's, so that queries find their own topic's keys and some of others'. Tokens are 1.5 centre +
    unit noise (values: 0.3 noise).
    """
    generator = torch.Generator().manual_seed(seed)
    topics = max(8, case.num_tokens // 200)
    weights = torch.exp(0.7 * torch.randn(topics, generator=generator))
    topic = torch.multinomial(weights, case.num_tokens, replacement=True, generator=generator)
    shape = (1, case.num_heads, topics, case.head_dim)
    query_centres, independent, value_centres = (torch.randn(shape, generator=generator) for _ in range(3))
    key_centres = 0.7 * query_centres + 0.7 * independent
    tokens = []
    for centres, noise in ((query_centres, 1.0), (key_centres, 1.0), (value_centres, 0.3)):
        x = 1.5 * centres[:, :, topic]
        tokens.append(x.add_(torch.randn(x.shape, generator=generator), alpha=noise).to(case.dtype))
    return tokens[0], tokens[1], tokens[2]


class RewrittenAttention:
    """One call of the rewritten attention, stage by stage, from the centroids of the step before."""

    def __init__(self, case: Case, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.case = case
        self.query, self.key, self.value = query, key, value
        self.scale = case.head_dim**-0.5
        self.q_centroids = self._first_step(query, QUERY_CLUSTERS)
        self.k_centroids = self._first_step(key, KEY_CLUSTERS)
        self.run()

    def _first_step(self, x: Tensor, rule: CountRule) -> Tensor:
        batch, heads, num_tokens, head_dim = x.shape
        unused = torch.zeros(batch, heads, rule.count(num_tokens), head_dim)
        return ops.kmeans(x, unused, torch.tensor(False), 10)[1]

    def cluster(self) -> None:
        warm = torch.tensor(True)
        self.q_labels, self.q_means, self.q_sizes = ops.kmeans(self.query, self.q_centroids, warm, WARM_ITERS)
        self.k_labels, self.k_means, self.k_sizes = ops.kmeans(self.key, self.k_centroids, warm, WARM_ITERS)

    def select(self) -> None:
        self.block_map = ops.select_blocks(
            self.q_means, self.k_means, self.q_sizes, self.k_sizes, self.scale, 0.9, 0.0, self.case.density
        )

    def permute(self) -> None:
        num_tokens = self.case.num_tokens
        self.q_order, self.q_offsets = ops.cluster_order(self.q_labels, self.q_means.shape[2], 0, num_tokens)
        self.k_order, self.k_offsets = ops.cluster_order(self.k_labels, self.k_means.shape[2], 0, num_tokens)
        self.q_permuted = ops.permute_tokens(self.query, self.q_order)
        self.k_permuted = ops.permute_tokens(self.key, self.k_order)
        self.v_permuted = ops.permute_tokens(self.value, self.k_order)

    def attend(self) -> None:
        self.out_permuted, _ = ops.block_sparse_attention(
            self.q_permuted,
            self.k_permuted,
            self.v_permuted,
            self.q_offsets,
            self.k_offsets,
            self.block_map,
            self.scale,
        )

    def unpermute(self) -> None:
        self.out = ops.unpermute_tokens(self.out_permuted, self.q_order)

    @property
    def stages(self) -> dict[str, Callable[[], None]]:
        return {
            "cluster": self.cluster,
            "select": self.select,
            "permute": self.permute,
            "attend": self.attend,
            "unpermute": self.unpermute,
        }

    def run(self) -> None:
        for stage in self.stages.values():
            stage()

    def achieved_density(self) -> float:
        return float(ops.block_density(self.q_offsets, self.k_offsets, self.block_map).mean())

    def exact_rows(self, rows: Tensor) -> Tensor:
        """What permuted query ``rows`` of every head should be, in float64, by a dense softmax with a mask."""
        results = []
        for head in range(self.case.num_heads):
            q_block = torch.searchsorted(self.q_offsets[0, head, 1:].contiguous(), rows.to(torch.int32), right=True)
            positions = torch.arange(self.case.num_tokens, dtype=torch.int32)
            k_block = torch.searchsorted(self.k_offsets[0, head, 1:].contiguous(), positions, right=True)
            mask = self.block_map[0, head][q_block][:, k_block]
            scores = self.scale * (self.q_permuted[0, head, rows].double() @ self.k_permuted[0, head].double().T)
            weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
            results.append(weights @ self.v_permuted[0, head].double())
        return torch.stack(results)
