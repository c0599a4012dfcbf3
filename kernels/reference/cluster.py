"""k-means, order, permutation and cluster means. Part of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOKENS_PER_CHUNK = 4096  # bounds [tokens, clusters] score matrices


# -------------------------------------------------------------------------------------------------------------- k-means
def _spread_seeds(x: Tensor, num_clusters: int, valid: Tensor) -> Tensor:
    """C tokens spread evenly over the valid ones: the middle one of each of C equal stretches. [B, H, C, D]."""
    valid_first = torch.argsort((~valid).to(torch.int32), dim=-1, stable=True)
    num_valid = valid.sum(dim=-1, keepdim=True)
    cluster = torch.arange(num_clusters, device=x.device)
    rank = ((2 * cluster + 1) * num_valid) // (2 * num_clusters)
    token = valid_first.gather(-1, rank)
    return x.gather(2, token.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """argmin of the Euclidean distance, as argmax of x.c - |c|^2 / 2. A non-finite centroid is chosen by nobody."""
    half_norms = centroids.square().sum(dim=-1) / 2
    usable = half_norms.isfinite()
    directions = torch.where(usable.unsqueeze(-1), centroids, 0.0).transpose(-1, -2)
    bias = torch.where(usable, half_norms, math.inf).unsqueeze(-2)
    chunks = [(chunk @ directions - bias).argmax(dim=-1) for chunk in x.split(TOKENS_PER_CHUNK, dim=2)]
    return torch.cat(chunks, dim=-1)


def _member_means(x: Tensor, labels: Tensor, valid: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each cluster's valid members (the previous centroid where there is none) and the number of members."""
    members = torch.where(valid.unsqueeze(-1), x, 0.0)
    sums = torch.zeros_like(previous).scatter_add_(2, labels.unsqueeze(-1).expand_as(members), members)
    sizes = torch.zeros(previous.shape[:3], dtype=torch.int64, device=x.device).scatter_add_(2, labels, valid.long())
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return torch.where((sizes > 0).unsqueeze(-1), means, previous), sizes


def kmeans(
    x: Tensor,
    centroids: Tensor,
    seeded: Tensor,
    iters: int,
    valid: Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm; see ``ops.kmeans``."""
    x = x.to(compute_dtype)
    if valid is None:
        valid = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
    valid = valid.expand(x.shape[:3])
    current = torch.where(seeded, centroids.to(compute_dtype), _spread_seeds(x, centroids.shape[2], valid))
    for _ in range(iters):
        labels = _nearest_centroid(x, current)
        current, sizes = _member_means(x, labels, valid, current)
    return labels.to(torch.int32), current.to(torch.float32, copy=True), sizes.to(torch.int32)


# ------------------------------------------------------------------------------------------------ order and permutation
def cluster_order(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stable sort of tokens by block; see ``ops.cluster_order``."""
    batch, heads, video_tokens = labels.shape
    context_block, null_block = num_clusters, num_clusters + 1
    blocks = labels.new_full((batch, heads, num_tokens), context_block)
    blocks[..., start : start + video_tokens] = labels
    if valid is not None:
        blocks = torch.where(valid, blocks, null_block)
    order = torch.argsort(blocks, dim=-1, stable=True)
    sizes = torch.nn.functional.one_hot(blocks.long(), num_clusters + 2).sum(dim=2)
    offsets = torch.nn.functional.pad(sizes.cumsum(dim=-1), (1, 0))
    return order.to(torch.int32), offsets.to(torch.int32)


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Row r of the result is token order[r]; see ``ops.permute_tokens``."""
    return x.gather(2, order.long().unsqueeze(-1).expand_as(x))


def unpermute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token order[r] of the result is row r; see ``ops.unpermute_tokens``."""
    batch, heads, num_tokens, head_dim = x.shape
    out = x.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2)
    return out.scatter_(2, order.long().unsqueeze(-1).expand_as(x), x)


def by_cluster(
    query: Tensor, key: Tensor, value: Tensor, q_order: Tensor | None, k_order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention reads, in the order of clusters; without an order it is there already."""
    if k_order is not None:
        key, value = permute_tokens(key, k_order), permute_tokens(value, k_order)
    if q_order is not None:
        query = permute_tokens(query, q_order)
    return query, key, value


def by_token(out: Tensor, lse: Tensor, q_order: Tensor | None) -> tuple[Tensor, Tensor]:
    """What attention returns, in the order that its queries had before :func:`by_cluster`."""
    if q_order is None:
        return out, lse
    return unpermute_tokens(out, q_order), torch.empty_like(lse).scatter_(2, q_order.to(torch.int64), lse)


def cluster_means(x: Tensor, offsets: Tensor, *, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean of the rows of each cluster; see ``ops.cluster_means``."""
    batch, heads, _, head_dim = x.shape
    num_clusters = offsets.shape[2] - 3
    means = x.new_zeros(batch, heads, num_clusters, head_dim, dtype=compute_dtype)
    for b in range(batch):
        for h in range(heads):
            bounds = offsets[b, h].tolist()
            for c in range(num_clusters):
                rows = x[b, h, bounds[c] : bounds[c + 1]].to(compute_dtype)
                if rows.shape[0] > 0:
                    means[b, h, c] = rows.mean(dim=0)
    return means.to(torch.float32)
