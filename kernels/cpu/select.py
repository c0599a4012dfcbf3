"""Which key blocks each query block attends to, on the CPU: by softmax mass (SVG2) or by compensation error (EAR)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.estimates import KeyHead, head_estimates


def select_blocks(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None = None,
) -> Tensor:
    """Largest softmax mass first; see ``ops.select_blocks``."""
    kept = _select_clusters(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density)
    return add_context_and_null(kept)


def per_query_head(tensor: Tensor, num_q_heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, Hq, ...], each key/value head repeated for the query heads that share it."""
    num_kv_heads = tensor.shape[1]
    return tensor if num_kv_heads == num_q_heads else tensor.repeat_interleave(num_q_heads // num_kv_heads, dim=1)


def _select_clusters(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None,
) -> Tensor:
    """Kept clusters, bool [B, Hq, Cq, Ck]."""
    num_q_heads = q_centroids.shape[1]
    sizes = per_query_head(k_sizes, num_q_heads).unsqueeze(2).to(torch.float32)
    logits = (q_centroids @ per_query_head(k_centroids, num_q_heads).transpose(-1, -2)).mul_(scale)
    if (top_p if density is None else density) >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    empty = sizes == 0
    broken = (~logits.isfinite() & ~empty).any(dim=-1, keepdim=True)
    mass = torch.softmax(logits.add_(sizes.log()).masked_fill_(empty, -math.inf), dim=-1).masked_fill_(empty, -1.0)
    if density is None:
        at_least = math.ceil(min_k_ratio * mass.shape[-1] - 1e-9)
        kept = _keep_until(mass, mass.clamp(min=0), top_p, at_least)
    else:
        kept = _keep_until(mass, sizes.expand_as(mass), density * sizes.sum(dim=-1, keepdim=True), 1)
    return (kept & ~empty) | broken


def _keep_until(priority: Tensor, cost: Tensor, budget: Tensor | float, at_least: int) -> Tensor:
    """Per row keep the highest priorities until their cost first reaches the budget, and ``at_least`` of them."""
    order = torch.argsort(priority, dim=-1, descending=True, stable=True)
    sorted_cost = cost.gather(-1, order)
    kept = sorted_cost.cumsum(dim=-1).sub_(sorted_cost) < budget
    kept[..., : max(at_least, 1)] = True
    return torch.empty_like(kept).scatter_(-1, order, kept)


def add_context_and_null(kept: Tensor) -> Tensor:
    """[B, Hq, Cq, Ck] -> [B, Hq, Cq + 2, Ck + 2]: the context row and column are True, the null column is False."""
    block_map = torch.nn.functional.pad(kept, (0, 2, 0, 2))
    block_map[..., -2, :] = True
    block_map[..., -2] = True
    block_map[..., -1] = False
    return block_map


# ------------------------------------------------------------------------------------------------ error-aware selection
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
) -> Tensor:
    """Largest compensation error per key first; see ``ops.select_blocks_by_error``."""
    return select_by_error(
        _log_errors, key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale, top_p, min_k_ratio, density
    )


def select_by_error(
    log_errors: Callable[..., Tensor],
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None,
) -> Tensor:
    """The same with a choice of who estimates: ``log_errors(key, value, k_offsets, q_centroids, k_centroids,
    v_centroids, scale)`` gives float32 [B, Hq, Cq, Ck], of which the caller may overwrite."""
    num_q_heads, num_q_clusters = q_centroids.shape[1:3]
    k_sizes = k_offsets.diff(dim=-1)[..., : k_centroids.shape[2]]
    sizes = per_query_head(k_sizes, num_q_heads).unsqueeze(2).to(torch.float32).expand(-1, -1, num_q_clusters, -1)
    if density is None or density >= 1:
        by_mass = _select_clusters(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density)
        if bool(by_mass.all()):
            return add_context_and_null(by_mass)
        budget = (sizes * by_mass).sum(dim=-1, keepdim=True)
    else:
        budget = density * sizes.sum(dim=-1, keepdim=True)
    errors = log_errors(key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale)
    empty = sizes == 0
    broken = (errors.isnan() & ~empty).any(dim=-1, keepdim=True)
    priority = errors.sub_(sizes.log()).masked_fill_(empty, -math.inf)
    return add_context_and_null((_keep_until(priority, sizes, budget, 1) & ~empty) | broken)


def _log_errors(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> Tensor:
    """Errors of compensation, as ``ops.block_estimates`` gives them beside its masses."""
    batch, num_q_heads, num_q_clusters, _ = q_centroids.shape
    num_kv_heads, num_k_clusters = k_centroids.shape[1:3]
    k_sizes = k_offsets.diff(dim=-1)[..., :num_k_clusters]
    result = q_centroids.new_empty(batch, num_q_heads, num_q_clusters, num_k_clusters)
    group = num_q_heads // max(num_kv_heads, 1)
    for b in range(batch):
        for g in range(num_kv_heads):
            heads = slice(g * group, (g + 1) * group)
            head = KeyHead(key[b, g], value[b, g], k_centroids[b, g], v_centroids[b, g], k_sizes[b, g])
            _, errors, _ = head_estimates(q_centroids[b, heads].flatten(0, 1), head, scale)
            result[b, heads] = errors.view(group, num_q_clusters, num_k_clusters)
    return result
