"""Which key blocks each query block attends to, on the CPU: by softmax mass (SVG2) or by compensation error (EAR)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.cluster import gather_rows
from svg2_compile.kernels.tuning.lookup import tuned


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
    return _add_context_and_null(kept)


def _per_query_head(tensor: Tensor, num_q_heads: int) -> Tensor:
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
    sizes = _per_query_head(k_sizes, num_q_heads).unsqueeze(2).to(torch.float32)
    logits = (q_centroids @ _per_query_head(k_centroids, num_q_heads).transpose(-1, -2)).mul_(scale)
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


def _add_context_and_null(kept: Tensor) -> Tensor:
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
    batch, num_q_heads, num_q_clusters, _ = q_centroids.shape
    num_kv_heads, num_k_clusters = k_centroids.shape[1:3]
    k_sizes = k_offsets.diff(dim=-1)[..., :num_k_clusters]
    sizes = _per_query_head(k_sizes, num_q_heads).unsqueeze(2).to(torch.float32).expand(-1, -1, num_q_clusters, -1)
    if density is None or density >= 1:
        by_mass = _select_clusters(q_centroids, k_centroids, k_sizes, scale, top_p, min_k_ratio, density)
        if bool(by_mass.all()):
            return _add_context_and_null(by_mass)
        budget = (sizes * by_mass).sum(dim=-1, keepdim=True)
    else:
        budget = density * sizes.sum(dim=-1, keepdim=True)
    log_errors = q_centroids.new_empty(batch, num_q_heads, num_q_clusters, num_k_clusters)
    group = num_q_heads // max(num_kv_heads, 1)
    for b in range(batch):
        for g in range(num_kv_heads):
            heads = slice(g * group, (g + 1) * group)
            errors = _log_errors(
                q_centroids[b, heads].flatten(0, 1),
                key[b, g],
                value[b, g],
                k_centroids[b, g],
                v_centroids[b, g],
                k_sizes[b, g],
                scale,
            )
            log_errors[b, heads] = errors.view(group, num_q_clusters, num_k_clusters)
    empty = sizes == 0
    broken = (log_errors.isnan() & ~empty).any(dim=-1, keepdim=True)
    priority = log_errors.sub_(sizes.log()).masked_fill_(empty, -math.inf)
    return _add_context_and_null((_keep_until(priority, sizes, budget, 1) & ~empty) | broken)


def _log_errors(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    k_sizes: Tensor,
    scale: float,
) -> Tensor:
    """ln |sum_t (exp(s q.k_t) - exp(s q.k_j)) (v_t - o)|^2 for queries [m, D] and the clusters of one head: [m, Ck].

    o is the output of q if every cluster is compensated. With d_t = s q.(k_t - k_j) and the largest of them (or 0) as
    shift, the weights are exp(s q.k_j + shift) times w_t = exp(d_t - shift) - exp(-shift): nothing overflows. And
    sum_t w_t (v_t - o) = sum_t w_t (v_t - v_j) + (sum_t w_t) (v_j - o): a matrix product per cluster, of small numbers.
    """
    scaled_queries = queries * scale
    mean_scores = scaled_queries @ k_centroids.t()
    # An empty cluster's centroid may be anything.
    outputs = torch.softmax((mean_scores + k_sizes.log()).masked_fill(k_sizes == 0, -math.inf), dim=-1) @ v_centroids
    log_sums = queries.new_full((k_centroids.shape[0], queries.shape[0]), -math.inf)
    key_differences = _differences_to_means(key, k_centroids, k_sizes)
    value_differences = _differences_to_means(value, v_centroids, k_sizes)
    # Floats of one [query clusters, tokens] tile: a few MiB, whatever the number of tokens.
    errors_per_tile = tuned("cpu_error", key.device, key.dtype, key.shape[1], key.shape[0])["ERRORS_PER_TILE"]
    for clusters, rows in _tiles_of_clusters(k_sizes, max(1, errors_per_tile // queries.shape[0])):
        # Padding is at the centroid: its weight is exactly 0.
        distance = gather_rows(key_differences, rows) @ scaled_queries.t()
        shift = distance.amax(dim=1, keepdim=True).clamp_(min=0.0)
        weights = distance.sub_(shift).exp_().sub_(torch.exp(-shift))
        error = weights.transpose(1, 2) @ gather_rows(value_differences, rows)
        mean_to_output = v_centroids.index_select(0, clusters).unsqueeze(1) - outputs
        error.addcmul_(weights.sum(dim=1).unsqueeze(-1), mean_to_output)
        log_sums[clusters] = error.square_().sum(dim=-1).log_().add_(shift.squeeze(1), alpha=2)
    return log_sums.t() + 2 * mean_scores


def _differences_to_means(tokens: Tensor, means: Tensor, sizes: Tensor) -> Tensor:
    """Clustered tokens [n, D] less the means [C, D] of their clusters, and a last row of zeros: float32 [m + 1, D], of
    the m <= n tokens in clusters of these sizes [C]."""
    mean_of_token = torch.repeat_interleave(means, sizes, dim=0, output_size=int(sizes.sum()))
    differences = means.new_zeros(mean_of_token.shape[0] + 1, means.shape[1])
    torch.sub(tokens[: mean_of_token.shape[0]].to(torch.float32), mean_of_token, out=differences[:-1])
    return differences


def _tiles_of_clusters(k_sizes: Tensor, tokens_per_tile: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Clusters of like size together: their indices [c] and the tokens of each [c, longest], padded with the index
    after the last token. Empty clusters are in no tile; one of more tokens than a tile's has a tile to itself."""
    ends = k_sizes.cumsum(dim=0)
    starts, padding = ends - k_sizes, ends[-1]
    order = torch.argsort(k_sizes, descending=True, stable=True)
    sizes = k_sizes[order].tolist()
    first = 0
    while first < len(sizes) and sizes[first] > 0:
        longest = sizes[first]
        last = min(first + max(1, tokens_per_tile // longest), len(sizes))
        # at most half of a tile is padding
        while sizes[last - 1] == 0 or (last - first > 1 and sizes[last - 1] < longest // 2):
            last -= 1
        clusters = order[first:last]
        place = torch.arange(longest)
        own = place < k_sizes[clusters].unsqueeze(1)
        yield clusters, torch.where(own, place + starts[clusters].unsqueeze(1), padding)
        first = last
