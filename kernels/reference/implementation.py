"""The oracle: every op in plain PyTorch, written to be read next to the paper (SVG2, arXiv 2505.18875, section 4).

Readable before fast: loops over heads and blocks, sorts instead of thresholds, whole matrices of scores in chunks of
queries. No other implementation imports this file. Every function has the signature of its op (see ``ops.py`` for
shapes and semantics) plus ``compute_dtype``, the precision of all arithmetic (float64 in tests, float32 otherwise).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg2_compile.kernels.reference.select import select_blocks, select_blocks_by_error

__all__ = [
    "block_density",
    "block_sparse_attention",
    "cluster_means",
    "cluster_order",
    "kmeans",
    "permute_tokens",
    "select_blocks",
    "select_blocks_by_error",
    "unpermute_tokens",
]

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


# ------------------------------------------------------------------------------------------------------------ attention
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    k_centroids: Tensor | None = None,
    v_centroids: Tensor | None = None,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    workspace_mb: int = 256,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over the keys of its selected key blocks; see
    ``ops.block_sparse_attention``. Knows no workspace."""
    if k_order is not None:
        key, value = permute_tokens(key, k_order), permute_tokens(value, k_order)
    if q_order is not None:
        query = permute_tokens(query, q_order)
    batch, q_heads, num_queries, _ = query.shape
    heads_per_group = q_heads // max(key.shape[1], 1)
    out = query.new_zeros(batch, q_heads, num_queries, value.shape[3])
    lse = query.new_full((batch, q_heads, num_queries), -math.inf, dtype=torch.float32)
    for b in range(batch):
        for h in range(q_heads):
            g = h // heads_per_group
            q_bounds, k_bounds = q_offsets[b, h].tolist(), k_offsets[b, g].tolist()
            for i, selected in enumerate(block_map[b, h].tolist()):
                rows = slice(q_bounds[i], q_bounds[i + 1])
                keys, values, bias = _visible_keys(key[b, g], value[b, g], k_bounds, selected, compute_dtype)
                if k_centroids is not None and v_centroids is not None:
                    extra = _skipped_clusters(k_centroids[b, g], v_centroids[b, g], k_bounds, selected, compute_dtype)
                    keys, values, bias = (torch.cat(pair) for pair in zip((keys, values, bias), extra, strict=True))
                if keys.shape[0] > 0:
                    logits = scale * (query[b, h, rows].to(compute_dtype) @ keys.T) + bias
                    out[b, h, rows] = (torch.softmax(logits, dim=-1) @ values).to(out.dtype)
                    lse[b, h, rows] = torch.logsumexp(logits, dim=-1).to(lse.dtype)
    if q_order is not None:
        return unpermute_tokens(out, q_order), torch.empty_like(lse).scatter_(2, q_order.long(), lse)
    return out, lse


def _visible_keys(
    key: Tensor, value: Tensor, bounds: list[int], selected: list[bool], compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [n, D], values [n, Dv] and zero bias [n] of the selected blocks of one head."""
    runs = [slice(bounds[j], bounds[j + 1]) for j, keep in enumerate(selected) if keep]
    keys = torch.cat([key[:0], *(key[run] for run in runs)]).to(compute_dtype)
    values = torch.cat([value[:0], *(value[run] for run in runs)]).to(compute_dtype)
    return keys, values, keys.new_zeros(keys.shape[0])


def _skipped_clusters(
    k_centroids: Tensor, v_centroids: Tensor, bounds: list[int], selected: list[bool], compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """EAR's compensation: each skipped, non-empty cluster as one key with its mean value and bias ln n_j."""
    sizes = [bounds[j + 1] - bounds[j] for j in range(k_centroids.shape[0])]
    skipped = [j for j, size in enumerate(sizes) if size > 0 and not selected[j]]
    index = torch.tensor(skipped, dtype=torch.int64, device=k_centroids.device)
    bias = torch.tensor([math.log(sizes[j]) for j in skipped], dtype=compute_dtype, device=k_centroids.device)
    return k_centroids[index].to(compute_dtype), v_centroids[index].to(compute_dtype), bias


def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected pairs over all pairs; see ``ops.block_density``."""
    repeats = block_map.shape[1] // max(k_offsets.shape[1], 1)
    q_sizes = q_offsets.diff(dim=-1).double()
    k_sizes = k_offsets.diff(dim=-1).double().repeat_interleave(repeats, dim=1)
    pairs = (q_sizes.unsqueeze(-1) * k_sizes.unsqueeze(-2) * block_map).sum(dim=(-1, -2))
    all_pairs = q_sizes.sum(dim=-1) * k_sizes.sum(dim=-1)
    return (pairs / all_pairs.clamp(min=1)).to(torch.float32)
