"""Pictures of one attention as numbers: in token order, permuted by clusters, and as the sparse attention has it.

Maps are averaged down to at most ``MAX_SIDE`` pixels while they are computed, rows at a time, so that no tensor with a
row and a column for every token ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_SIDE", "AttentionInputs", "AttentionMaps", "attention_maps"]

MAX_SIDE = 512
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class AttentionInputs:
    """One head of one sparse attention.

    query [N, D] and key [N, D] are in token order. q_order, k_order [N]: the token at every permuted position.
    q_offsets, k_offsets [blocks + 1]: where each block of the permuted order begins. block_map: bool [q blocks,
    k blocks]. k_centroids [clusters, D] float32 where clusters that were not selected are compensated for; to first
    order with log_mass [q clusters, k blocks] and q_centroids [q clusters, D], float32.
    """

    query: Tensor
    key: Tensor
    q_order: Tensor
    k_order: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    block_map: Tensor
    scale: float
    k_centroids: Tensor | None = None
    log_mass: Tensor | None = None
    q_centroids: Tensor | None = None

    def token_biases(self) -> Tensor | None:
        """What the score of a skipped cluster's token is more than that of its centroid: [q blocks, k blocks], where
        compensation is of first order. Tokens share the exact mass of their cluster equally."""
        if self.log_mass is None or self.q_centroids is None or self.k_centroids is None:
            return None
        scores = self.scale * (self.q_centroids @ self.k_centroids.float().T)
        clusters = self.log_mass[:, : scores.shape[1]] - scores - self.k_offsets.diff()[: scores.shape[1]].log()
        return torch.nn.functional.pad(clusters, (0, 2, 0, 2))


@dataclass(frozen=True)
class AttentionMaps:
    """Three maps, float32 [S, S], S = min(N, MAX_SIDE): mean attention weight times N, so that 1 is uniform.

    Attributes:
        original: dense attention, tokens in order.
        permuted: the same, queries and keys ordered by cluster.
        recovered: the weights of the sparse attention, tokens in order.
        density: selected pairs / all pairs. recall: dense attention mass on the selected pairs.
        num_tokens: N.
        site, step, head: which attention.
    """

    original: Tensor
    permuted: Tensor
    recovered: Tensor
    density: float
    recall: float
    num_tokens: int
    site: str = ""
    step: int = 0
    head: int = 0

    def facts(self) -> dict[str, Any]:
        """Which attention, and its numbers."""
        return {
            "site": self.site,
            "step": self.step,
            "head": self.head,
            "num_tokens": self.num_tokens,
            "density": self.density,
            "recall": self.recall,
        }


class _Pooled:
    """A map that is summed up in chunks of rows."""

    def __init__(self, num_tokens: int, side: int, device: torch.device) -> None:
        self.total = torch.zeros(side, side, device=device)
        self.side = side
        self.num_tokens = num_tokens

    def bins(self, positions: Tensor) -> Tensor:
        return positions * self.side // self.num_tokens

    def add(self, weights: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Add weights [r, N] of the rows and columns at the given positions of the map."""
        narrow = weights.new_zeros(len(weights), self.side).index_add_(1, self.bins(columns), weights)
        self.total.index_add_(0, self.bins(rows), narrow)

    def mean(self) -> Tensor:
        """The mean weight of every pixel, times the number of tokens."""
        positions = torch.arange(self.num_tokens, device=self.total.device)
        sizes = torch.bincount(self.bins(positions), minlength=self.side).float()
        return (self.total / (sizes[:, None] * sizes) * self.num_tokens).cpu()


@torch.no_grad()
def attention_maps(inputs: AttentionInputs, max_side: int = MAX_SIDE) -> AttentionMaps:
    """Compute the maps of one head.

    The recovered map has the weights that the sparse attention really uses: a softmax over the selected keys. With
    compensation a cluster that was not selected has the weight of its centroid, spread over its tokens.
    """
    num_tokens, device = len(inputs.query), inputs.query.device
    side = min(max_side, num_tokens)
    original, permuted, recovered = (_Pooled(num_tokens, side, device) for _ in range(3))
    tokens = torch.arange(num_tokens, device=device)
    q_rank, k_rank = _inverse(inputs.q_order), _inverse(inputs.k_order)
    q_block, k_block = _blocks(inputs.q_offsets, q_rank), _blocks(inputs.k_offsets, k_rank)
    masked = k_block == inputs.block_map.shape[1] - 1  # the null block
    key = inputs.key.float()
    centroid_of_key = None if inputs.k_centroids is None else _spread(inputs.k_centroids.float(), k_block)
    biases = inputs.token_biases()
    selected_pairs = mass = 0.0
    rows_at_once = max(1, CHUNK_ELEMENTS // num_tokens)
    for rows in tokens.split(rows_at_once):
        query = inputs.query[rows].float() * inputs.scale
        scores = (query @ key.T).masked_fill(masked, -torch.inf)
        selected = inputs.block_map[q_block[rows]][:, k_block] & ~masked
        weights = scores.softmax(-1).nan_to_num(0)
        original.add(weights, rows, tokens)
        permuted.add(weights, q_rank[rows], k_rank)
        mass += float((weights * selected).sum())
        selected_pairs += float(selected.sum())
        rest = torch.full_like(scores, -torch.inf) if centroid_of_key is None else query @ centroid_of_key.T
        if biases is not None:
            rest = rest + biases[q_block[rows]][:, k_block]
        rest = rest.masked_fill(masked, -torch.inf)
        sparse = torch.where(selected, scores, rest).softmax(-1).nan_to_num(0)
        recovered.add(sparse, rows, tokens)
    return AttentionMaps(
        *(original.mean(), permuted.mean(), recovered.mean()),
        density=selected_pairs / num_tokens**2,
        recall=mass / num_tokens,
        num_tokens=num_tokens,
    )


def _inverse(order: Tensor) -> Tensor:
    """The permuted position of every token."""
    order = order.long()
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _blocks(offsets: Tensor, rank: Tensor) -> Tensor:
    """The block of every token."""
    numbers = torch.arange(len(offsets) - 1, device=offsets.device)
    return numbers.repeat_interleave(offsets.diff().long())[rank]


def _spread(centroids: Tensor, block: Tensor) -> Tensor:
    """Every token's centroid. Context and null tokens have none; they are always selected, or masked."""
    return centroids[block.clamp(max=len(centroids) - 1)]
