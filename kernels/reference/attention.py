"""Block-sparse attention and its density. Part of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg2_compile.kernels.reference.cluster import by_cluster, by_token


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
    query, key, value = by_cluster(query, key, value, q_order, k_order)
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
    return by_token(out, lse, q_order)


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
