"""The oracle of block selection: by softmax mass (SVG2) and by compensation error (EAR). Part of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _keep_until(priority: Tensor, cost: Tensor, budget: Tensor, min_count: int) -> Tensor:
    """Per row keep the highest priorities until their cost first reaches the budget, and at least min_count of
    them."""
    order = torch.argsort(priority, dim=-1, descending=True, stable=True)
    sorted_cost = cost.gather(-1, order)
    cost_before = sorted_cost.cumsum(dim=-1) - sorted_cost
    rank = torch.arange(order.shape[-1], device=order.device)
    kept_in_order = (cost_before < budget) | (rank < max(min_count, 1))
    return torch.zeros_like(kept_in_order).scatter_(-1, order, kept_in_order)


def with_context_and_null(kept: Tensor) -> Tensor:
    """Clusters' map [B, Hq, Cq, Ck] -> block map [B, Hq, Cq + 2, Ck + 2]: context row and column True, null ones
    False."""
    block_map = torch.nn.functional.pad(kept, (0, 2, 0, 2))
    block_map[..., -2, :] = True
    block_map[..., -2] = True
    block_map[..., -1] = False
    return block_map


def min_clusters(min_k_ratio: float, num_clusters: int) -> int:
    """Smallest whole number of clusters that is at least min_k_ratio of them (0.1 * 30 must give 3, not 4)."""
    return math.ceil(min_k_ratio * num_clusters - 1e-9)


def _log_masses(
    q_centroids: Tensor, k_centroids: Tensor, k_sizes: Tensor, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logit plus log size per (query cluster, key cluster); which are empty; which rows are broken; sizes per query
    head."""
    repeats = q_centroids.shape[1] // max(k_centroids.shape[1], 1)
    keys = k_centroids.to(compute_dtype).repeat_interleave(repeats, dim=1)
    sizes = k_sizes.to(compute_dtype).repeat_interleave(repeats, dim=1).unsqueeze(2)
    logits = scale * (q_centroids.to(compute_dtype) @ keys.transpose(-1, -2))
    empty = (sizes == 0).expand_as(logits)
    broken = (~logits.isfinite() & ~empty).any(dim=-1, keepdim=True)
    return (logits + sizes.log()).masked_fill(empty, -math.inf), empty, broken, sizes.expand_as(logits)


def select_clusters(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """SVG2 section 4.2: the clusters kept per query cluster, bool [B, Hq, Cq, Ck]."""
    log_mass, empty, broken, sizes = _log_masses(q_centroids, k_centroids, k_sizes, scale, compute_dtype)
    if (density is None and top_p >= 1) or (density is not None and density >= 1):
        return torch.ones_like(empty)
    mass = torch.softmax(log_mass, dim=-1).masked_fill(empty, -1.0)  # empty clusters come last
    if density is None:
        budget = torch.full_like(sizes[..., :1], top_p)
        kept = _keep_until(mass, mass.clamp(min=0), budget, min_clusters(min_k_ratio, mass.shape[-1]))
    else:
        kept = _keep_until(mass, sizes, density * sizes.sum(dim=-1, keepdim=True), 1)
    return (kept & ~empty) | broken


def select_blocks(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Largest softmax mass first; see ``ops.select_blocks``."""
    kept = select_clusters(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density, compute_dtype)
    return with_context_and_null(kept)


def select_blocks_by_error(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    q_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Largest compensation error per key first; see ``ops.select_blocks_by_error``."""
    num_clusters = k_centroids.shape[2]
    k_sizes = k_offsets.diff(dim=-1)[..., :num_clusters]
    repeats = q_centroids.shape[1] // max(k_centroids.shape[1], 1)
    sizes = k_sizes.repeat_interleave(repeats, dim=1).unsqueeze(2).to(compute_dtype)
    sizes = sizes.expand(-1, -1, q_centroids.shape[2], -1)
    if density is None or density >= 1:
        by_mass = select_clusters(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density, compute_dtype)
        if bool(by_mass.all()):
            return with_context_and_null(by_mass)
        budget = (sizes * by_mass).sum(dim=-1, keepdim=True)
    else:
        budget = density * sizes.sum(dim=-1, keepdim=True)
    log_error = log_errors(key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale, compute_dtype)
    empty = sizes == 0
    broken = (log_error.isnan() & ~empty).any(dim=-1, keepdim=True)
    priority = (log_error - sizes.log()).masked_fill(empty, -math.inf)
    # An empty cluster and one with error 0 both have priority -inf; masking afterwards keeps the empty one out.
    return with_context_and_null((_keep_until(priority, sizes, budget, 1) & ~empty) | broken)


def log_errors(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """ln e_ij with e_ij = |sum_t (exp(s q_i.k_t) - exp(s q_i.k_j)) (v_t - o_i)|^2, over the keys t of cluster j, and
    o_i the output of q_i if every cluster is compensated. [B, Hq, Cq, Ck].

    Exponentials are taken relative to the largest of the cluster, which is put back as a logarithm: no overflow, no
    underflow.
    """
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    kv_heads, num_k_clusters = k_centroids.shape[1:3]
    log_error = q_centroids.new_full((batch, q_heads, num_q_clusters, num_k_clusters), -math.inf, dtype=compute_dtype)
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // kv_heads)
            queries = q_centroids[b, h].to(compute_dtype)
            bounds = k_offsets[b, g].tolist()
            mean_scores = scale * (queries @ k_centroids[b, g].to(compute_dtype).T)
            sizes = k_offsets[b, g].diff()[:num_k_clusters].to(compute_dtype)
            log_mass = (mean_scores + sizes.log()).masked_fill(sizes == 0, -math.inf)
            outputs = torch.softmax(log_mass, dim=-1) @ v_centroids[b, g].to(compute_dtype)
            for j in range(num_k_clusters):
                keys = key[b, g, bounds[j] : bounds[j + 1]].to(compute_dtype)
                values = value[b, g, bounds[j] : bounds[j + 1]].to(compute_dtype)
                key_scores, mean_score = scale * (queries @ keys.T), mean_scores[:, j].unsqueeze(-1)
                largest = torch.cat((key_scores, mean_score), dim=1).amax(dim=1, keepdim=True)
                weights = torch.exp(key_scores - largest) - torch.exp(mean_score - largest)
                error = (weights.unsqueeze(-1) * (values - outputs.unsqueeze(1))).sum(dim=1)
                log_error[b, h, :, j] = error.square().sum(dim=-1).log() + 2 * largest.squeeze(-1)
    return log_error
