"""One budget for all heads of a layer, on the CPU: the threshold by counting, not by sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.select import add_context_and_null, per_query_head

MAX_LOG_BOOST = 8.0
ROWS = 2048  # at a time, so that they stay in the cache
BINS = 1 << 16  # of the upper half of a float's bits


def cluster_variances(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor) -> Tensor:
    """Mean square of the members' distance to their centroid, per dimension; see ``ops.cluster_variances``."""
    variances = torch.zeros_like(centroids, memory_format=torch.contiguous_format)
    num_clusters = centroids.shape[2]
    sizes = offsets.diff(dim=-1)[..., :num_clusters]
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            cluster = torch.repeat_interleave(torch.arange(num_clusters), sizes[b, h])
            for own, rows in zip(cluster.split(ROWS), order[b, h, : cluster.shape[0]].split(ROWS), strict=True):
                away = x[b, h].index_select(0, rows).to(torch.float32).sub_(centroids[b, h].index_select(0, own))
                variances[b, h].index_add_(0, own, away.square_())
    return variances.div_(sizes.clamp(min=1).unsqueeze(-1))


def farthest_members(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, count: int) -> Tensor:
    """What the members farthest from their centroid differ by; see ``ops.farthest_members``."""
    num_clusters, width = centroids.shape[2:]
    farthest = x.new_zeros(*centroids.shape[:3], count, width, dtype=torch.float32)
    sizes = offsets.diff(dim=-1)[..., :num_clusters]
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            cluster = torch.repeat_interleave(torch.arange(num_clusters), sizes[b, h])
            rows = x[b, h].index_select(0, order[b, h, : cluster.shape[0]]).to(torch.float32)
            away = rows.sub_(centroids[b, h].index_select(0, cluster))
            # By distance, and then by cluster without changing that.
            ranked = away.square().sum(dim=1).argsort(descending=True, stable=True)
            ranked = ranked[cluster[ranked].argsort(stable=True)]
            rank = torch.arange(cluster.shape[0]) - offsets[b, h].index_select(0, cluster)
            chosen = rank < count
            farthest[b, h, cluster[chosen], rank[chosen]] = away[ranked[chosen]]
    return farthest


def select_blocks_of_layer(
    log_mass: Tensor,
    log_error: Tensor,
    q_variances: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_offsets: Tensor,
    scale: float,
    density: Tensor,
    far_members: Tensor | None = None,
) -> Tensor:
    """The blocks of most error per pair over all heads of a batch item; see ``ops.select_blocks_of_layer``."""
    num_q_heads, num_k_clusters = q_sizes.shape[1], k_centroids.shape[2]
    if float(density) >= 1:
        return add_context_and_null(torch.ones_like(log_error, dtype=torch.bool))
    k_sizes = per_query_head(k_offsets.diff(dim=-1)[..., :num_k_clusters], num_q_heads).unsqueeze(2)
    empty = k_sizes == 0
    cluster_mass = log_mass[..., :num_k_clusters]
    broken = ((log_error.isnan() | ~cluster_mass.isfinite()) & ~empty).any(dim=-1, keepdim=True)
    keys = per_query_head(k_centroids, num_q_heads).masked_fill(empty.transpose(-1, -2), 0.0)
    priority = _log_boosts(cluster_mass, q_variances, keys, empty, scale)
    if far_members is not None:
        priority = torch.logaddexp(priority, _log_boosts_of_members(log_mass, far_members, keys, q_sizes, scale))
    priority.add_(log_error).sub_(k_sizes.to(torch.float32).log()).sub_(log_mass.logsumexp(-1, keepdim=True), alpha=2)
    pairs = q_sizes.unsqueeze(-1).to(torch.float64) * k_sizes
    pairs.masked_fill_(broken, 0.0)
    priority.masked_fill_((pairs == 0) | empty, -math.inf)
    kept = torch.zeros_like(empty).expand_as(priority).clone()
    for b in range(priority.shape[0]):
        kept[b] = _highest(priority[b], pairs[b], float(density))
    return add_context_and_null((kept | broken) & ~empty)


def _log_boosts(cluster_mass: Tensor, q_variances: Tensor, keys: Tensor, empty: Tensor, scale: float) -> Tensor:
    """min(8, u_ij / 2), u_ij = s^2 sum_d var_id (c_jd - cbar_id)^2: [B, Hq, Cq, Ck].

    Squares are multiplied out, of keys about their mean: then little cancels.
    """
    empty_keys = empty.transpose(-1, -2)
    filled = (~empty_keys).sum(dim=2, keepdim=True).clamp_(min=1)
    keys = (keys - keys.sum(dim=2, keepdim=True) / filled).masked_fill_(empty_keys, 0.0)
    mean_key = torch.softmax(cluster_mass, dim=-1) @ keys
    weighted = q_variances * mean_key
    boost = (q_variances @ keys.square().transpose(-1, -2)).sub_(weighted @ keys.transpose(-1, -2), alpha=2)
    boost.add_((weighted * mean_key).sum(dim=-1, keepdim=True)).mul_(0.5 * scale * scale)
    return boost.clamp_(min=0.0, max=MAX_LOG_BOOST)


def _log_boosts_of_members(
    log_mass: Tensor, far_members: Tensor, keys: Tensor, q_sizes: Tensor, scale: float
) -> Tensor:
    """ln(sum_m (P_mj / P_ij)^2 / n_i): [B, Hq, Cq, Ck]. Head by head: products of every member are S times as many."""
    boosts = torch.full_like(log_mass[..., : keys.shape[2]], -math.inf)
    present = torch.arange(far_members.shape[3]) < q_sizes.unsqueeze(-1)
    totals = log_mass.logsumexp(-1)
    for b in range(boosts.shape[0]):
        for h in range(boosts.shape[1]):
            gain = (far_members[b, h] @ keys[b, h].transpose(0, 1)).mul_(scale)  # [Cq, S, Ck]
            clusters = (gain + log_mass[b, h, :, None, : keys.shape[2]]).logsumexp(-1)
            total = torch.logaddexp(clusters, log_mass[b, h, :, None, keys.shape[2]]) - totals[b, h, :, None]
            gain.sub_(total.unsqueeze(-1)).mul_(2).masked_fill_(~present[b, h].unsqueeze(-1), -math.inf)
            boosts[b, h] = gain.logsumexp(1)
    return boosts.sub_(q_sizes.clamp(min=1).to(torch.float32).log().unsqueeze(-1))


def _highest(priority: Tensor, pairs: Tensor, density: float) -> Tensor:
    """Of one batch item the highest priorities until their pairs first reach density * (all pairs); none of -inf."""
    shape, priority, pairs = priority.shape, priority.flatten(), pairs.flatten()
    budget = density * float(pairs.sum())
    # Bits of floats are in the floats' order, once those of negative ones are turned around.
    bits = priority.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bins = (order >> 16).to(torch.int64).add_(BINS // 2)
    above = torch.bincount(bins, weights=pairs, minlength=BINS).flip(0).cumsum(0)
    last = BINS - 1 - int(torch.searchsorted(above, budget))  # the bin in which the budget is reached
    kept = bins > last
    tied = (bins == last).nonzero().squeeze(1)
    tied = tied[priority[tied].argsort(descending=True, stable=True)]
    cost = pairs[tied]
    kept[tied] = float(pairs[kept].sum()) + cost.cumsum(0) - cost < budget
    return kept.logical_and_(priority > -math.inf).view(shape)
