"""First-order compensation: what a skipped cluster is to a query near its own cluster's centroid. Part of the
reference.

For a query q of cluster i, with centroid q_i, every skipped key cluster j is one key of logit s (q - q_i).c_j + ln m_ij
and value v_j + D_i + (q - q_i) G: exact at q = q_i, and right to first order in q - q_i.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from svg2_compile.kernels.reference.cluster import by_cluster, by_token
from svg2_compile.kernels.reference.pool import block_estimates


def _clusters(tokens: Tensor, bounds: list[int], compute_dtype: torch.dtype) -> list[Tensor]:
    """The rows of each cluster of one head; context and null blocks are left out."""
    return [tokens[begin:end].to(compute_dtype) for begin, end in itertools.pairwise(bounds[:-2])]


def first_order_terms(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    block_map: Tensor,
    scale: float,
    residual_of_all: Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Residual of every query cluster and slope of every key head; see ``ops.first_order_terms``. Always by its
    definition, whatever is known of all clusters."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    kv_heads, _, value_dim = v_centroids.shape[1:]
    residual = q_centroids.new_zeros(batch, q_heads, num_q_clusters, value_dim, dtype=compute_dtype)
    slope = q_centroids.new_zeros(batch, kv_heads, key.shape[3], value_dim, dtype=compute_dtype)
    for b in range(batch):
        for g in range(kv_heads):
            bounds = k_offsets[b, g].tolist()
            keys, values = (_clusters(x[b, g], bounds, compute_dtype) for x in (key, value))
            spreads = [v - v_centroids[b, g, j].to(compute_dtype) for j, v in enumerate(values)]
            for j, spread in enumerate(spreads):
                slope[b, g] += scale * (keys[j] - k_centroids[b, g, j].to(compute_dtype)).T @ spread
            slope[b, g] /= max(bounds[-3], 1)
            heads_per_group = q_heads // kv_heads
            for h in range(g * heads_per_group, (g + 1) * heads_per_group):
                for i in range(num_q_clusters):
                    skipped = [j for j, k in enumerate(keys) if len(k) > 0 and not block_map[b, h, i, j]]
                    if not skipped:
                        continue
                    centroid = q_centroids[b, h, i].to(compute_dtype)
                    total = log_mass[b, h, i, skipped].to(compute_dtype).logsumexp(dim=0)
                    for j in skipped:
                        residual[b, h, i] += torch.exp(scale * (keys[j] @ centroid) - total) @ spreads[j]
    return residual.to(torch.float32), slope.to(torch.float32)


def first_order_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masses, errors and the residual if nothing is selected; see ``ops.first_order_estimates``."""
    clustered = (key, value, k_offsets, q_centroids, k_centroids, v_centroids)
    log_mass, log_error = block_estimates(*clustered, scale, compute_dtype=compute_dtype)
    rows, columns = log_mass.shape[2] + 2, log_mass.shape[3]
    nothing = torch.zeros(*log_mass.shape[:2], rows, columns, dtype=torch.bool)
    residual, _ = first_order_terms(*clustered, log_mass, nothing, scale, compute_dtype=compute_dtype)
    return log_mass, log_error, residual


def first_order_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    residual: Tensor,
    slope: Tensor,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    workspace_mb: int = 256,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Selected keys exactly, skipped clusters to first order; see ``ops.first_order_attention``. Knows no workspace."""
    query, key, value = by_cluster(query, key, value, q_order, k_order)
    batch, q_heads, num_queries, _ = query.shape
    num_q_clusters, num_k_clusters = q_centroids.shape[2], k_centroids.shape[2]
    out = query.new_zeros(batch, q_heads, num_queries, value.shape[3])
    lse = query.new_full((batch, q_heads, num_queries), -math.inf, dtype=torch.float32)
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // key.shape[1])
            q_bounds, k_bounds = q_offsets[b, h].tolist(), k_offsets[b, g].tolist()
            clusters = (k_centroids[b, g].to(compute_dtype), v_centroids[b, g].to(compute_dtype))
            for i, selected in enumerate(block_map[b, h].tolist()):
                runs = [slice(k_bounds[j], k_bounds[j + 1]) for j, keep in enumerate(selected) if keep]
                keys, values = (torch.cat([x[b, g][:0], *(x[b, g][run] for run in runs)]) for x in (key, value))
                rows = query[b, h, q_bounds[i] : q_bounds[i + 1]].to(compute_dtype)
                logits = scale * (rows @ keys.to(compute_dtype).T)
                values, added = values.to(compute_dtype), rows.new_zeros(rows.shape[0], value.shape[3])
                if i < num_q_clusters:
                    filled = (j for j in range(num_k_clusters) if k_bounds[j + 1] > k_bounds[j])
                    skipped = [j for j in filled if not selected[j]]
                    away = rows - q_centroids[b, h, i].to(compute_dtype)
                    masses = log_mass[b, h, i, skipped].to(compute_dtype)
                    mean_logits = scale * (away @ clusters[0][skipped].T) + masses
                    logits, values = torch.cat([logits, mean_logits], dim=1), torch.cat([values, clusters[1][skipped]])
                    if skipped:
                        added = residual[b, h, i].to(compute_dtype) + away @ slope[b, g].to(compute_dtype)
                if logits.shape[1] > 0:
                    weights = torch.softmax(logits, dim=-1)
                    share = weights[:, keys.shape[0] :].sum(dim=-1, keepdim=True)
                    result = (weights @ values + share * added).to(out.dtype)
                    out[b, h, q_bounds[i] : q_bounds[i + 1]] = result
                    lse[b, h, q_bounds[i] : q_bounds[i + 1]] = torch.logsumexp(logits, dim=-1).to(lse.dtype)
    return by_token(out, lse, q_order)
