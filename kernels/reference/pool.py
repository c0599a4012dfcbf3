"""What selection and first-order compensation know of blocks, and the selection that one budget of all heads makes.
Part of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg2_compile.kernels.reference.cluster import permute_tokens
from svg2_compile.kernels.reference.select import log_errors, with_context_and_null

MAX_LOG_BOOST = 8.0  # coarse clusters: beyond this their variance says little


def cluster_variances(
    x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mean square of the members' distance to their centroid, per dimension; see ``ops.cluster_variances``."""
    permuted = permute_tokens(x, order).to(compute_dtype)
    variances = torch.zeros_like(centroids, dtype=compute_dtype)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            bounds = offsets[b, h].tolist()
            for c in range(centroids.shape[2]):
                members = permuted[b, h, bounds[c] : bounds[c + 1]]
                if members.shape[0] > 0:
                    variances[b, h, c] = (members - centroids[b, h, c].to(compute_dtype)).square().mean(dim=0)
    return variances.to(torch.float32)


def farthest_members(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    centroids: Tensor,
    count: int,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the members farthest from their centroid differ by; see ``ops.farthest_members``."""
    permuted = permute_tokens(x, order).to(compute_dtype)
    farthest = centroids.new_zeros(*centroids.shape[:3], count, centroids.shape[3], dtype=compute_dtype)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            bounds = offsets[b, h].tolist()
            for c in range(centroids.shape[2]):
                away = permuted[b, h, bounds[c] : bounds[c + 1]] - centroids[b, h, c].to(compute_dtype)
                first = away.square().sum(dim=1).argsort(descending=True, stable=True)[:count]
                farthest[b, h, c, : first.shape[0]] = away[first]
    return farthest.to(torch.float32)


def block_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Exact mass of every block at the query centroids, and the error of compensating it; see
    ``ops.block_estimates``."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    num_k_clusters = k_centroids.shape[2]
    log_mass = q_centroids.new_full((batch, q_heads, num_q_clusters, num_k_clusters + 2), -math.inf)
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // k_centroids.shape[1])
            bounds = k_offsets[b, g].tolist()
            for j in range(num_k_clusters + 1):  # the null block is attended by nobody
                keys = key[b, g, bounds[j] : bounds[j + 1]].to(compute_dtype)
                scores = scale * (q_centroids[b, h].to(compute_dtype) @ keys.T)
                log_mass[b, h, :, j] = scores.logsumexp(dim=1)
    means = (q_centroids, k_centroids, v_centroids)
    return log_mass, log_errors(key, value, k_offsets, *means, scale, compute_dtype).to(torch.float32)


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
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The blocks of most error per pair over all heads of a batch item; see ``ops.select_blocks_of_layer``."""
    num_k_clusters = k_centroids.shape[2]
    repeats = q_sizes.shape[1] // max(k_centroids.shape[1], 1)
    k_sizes = k_offsets.diff(dim=-1)[..., :num_k_clusters].repeat_interleave(repeats, dim=1).unsqueeze(2)
    log_mass, log_error = log_mass.to(compute_dtype), log_error.to(compute_dtype)
    empty = (k_sizes == 0).expand_as(log_error)
    unknown = log_error.isnan() | ~log_mass[..., :num_k_clusters].isfinite()
    broken = (unknown & ~empty).any(dim=-1, keepdim=True)
    boost = _log_boost(log_mass, q_variances, k_centroids, empty, scale, compute_dtype)
    if far_members is not None:
        members = _log_boost_of_members(log_mass, far_members, k_centroids, q_sizes, empty, scale, compute_dtype)
        boost = torch.logaddexp(boost, members)
    total = log_mass.logsumexp(dim=-1, keepdim=True)
    priority = log_error - 2 * total - k_sizes.to(compute_dtype).log() + boost
    pairs = (q_sizes.unsqueeze(-1).double() * k_sizes).masked_fill(broken, 0)
    # Whatever needs no selection: without pairs, or with an error of 0.
    priority = priority.masked_fill((pairs == 0) | broken | empty, -math.inf)
    kept = torch.zeros_like(empty)
    for b in range(priority.shape[0]):
        order = torch.argsort(priority[b].flatten(), descending=True, stable=True)
        cost = pairs[b].flatten()[order]
        chosen = (cost.cumsum(dim=0) - cost < density.double() * cost.sum()) & (
            priority[b].flatten()[order] > -math.inf
        )
        kept[b] = torch.zeros_like(chosen).scatter_(0, order, chosen).view_as(kept[b])
    kept = (kept | broken) & ~empty
    return with_context_and_null(kept | (density >= 1))


def _filled_keys(k_centroids: Tensor, empty: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The mean keys of every query head, [B, Hq, Ck, D]; 0 of an empty cluster, whose mean may be anything."""
    repeats = empty.shape[1] // max(k_centroids.shape[1], 1)
    keys = k_centroids.to(compute_dtype).repeat_interleave(repeats, dim=1)
    return keys.masked_fill(empty[:, :, :1].transpose(-1, -2), 0.0)


def _log_boost(
    log_mass: Tensor, q_variances: Tensor, k_centroids: Tensor, empty: Tensor, scale: float, compute_dtype: torch.dtype
) -> Tensor:
    """min(8, u_ij / 2), u_ij the variance of the logit of j among the queries of i, relative to their mean key."""
    keys = _filled_keys(k_centroids, empty, compute_dtype)
    mean_key = torch.softmax(log_mass[..., : keys.shape[2]], dim=-1) @ keys
    away = (keys.unsqueeze(2) - mean_key.unsqueeze(3)).square()  # [B, Hq, Cq, Ck, D]
    variance = scale * scale * (away @ q_variances.to(compute_dtype).unsqueeze(-1)).squeeze(-1)
    return (0.5 * variance).clamp(max=MAX_LOG_BOOST)


def _log_boost_of_members(
    log_mass: Tensor,
    far_members: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    empty: Tensor,
    scale: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """ln(sum_m (P_mj / P_ij)^2 / n_i) over the members that there are; the context's mass is what it is at q_i."""
    keys = _filled_keys(k_centroids, empty, compute_dtype)
    gain = scale * (far_members.to(compute_dtype) @ keys.unsqueeze(2).transpose(-1, -2))  # [B, Hq, Cq, S, Ck]
    masses = log_mass[..., : keys.shape[2]].unsqueeze(3) + gain
    context = log_mass[..., keys.shape[2], None, None].expand(*masses.shape[:-1], 1)
    total = torch.cat([masses, context], dim=-1).logsumexp(dim=-1, keepdim=True)
    total = total - log_mass.logsumexp(dim=-1)[..., None, None]
    present = torch.arange(far_members.shape[3], device=q_sizes.device) < q_sizes.unsqueeze(-1)
    squares = (2 * (gain - total)).masked_fill(~present.unsqueeze(-1), -math.inf).logsumexp(dim=3)
    return squares - q_sizes.clamp(min=1).to(compute_dtype).log().unsqueeze(-1)
