"""First-order compensation on the CPU: what skipped clusters leave out, and attention that puts it back.

The selected keys are ATen's fused attention, as in ``attention.py``. What a query skips is a small dense attention over
the clusters, and the two are merged by their log-sum-exp; the skipped part of the row's sum, which the first-order
terms are weighted by, is known on the way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.attention import attend_to_blocks
from svg2_compile.kernels.cpu.cluster import by_cluster, by_token

SCORES_PER_TILE = 1 << 17  # floats of a [tokens, clusters] tile: it stays in the second-level cache
# Beside 1, exp() of less is nothing; and products with it are normal numbers: others take ten times as long.
LEAST_EXPONENT = -60.0
NO_SHARE = 1e-20  # more than all that weights of LEAST_EXPONENT sum up to


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
) -> tuple[Tensor, Tensor]:
    """Residual of every query cluster and slope of every key head; see ``ops.first_order_terms``. residual_of_all is
    of no use here: products are over tiles of tokens, of which some query selects nearly every one."""
    batch, q_heads, num_q_clusters, head_dim = q_centroids.shape
    kv_heads, num_k_clusters, value_dim = v_centroids.shape[1:]
    residual = q_centroids.new_zeros(batch, q_heads, num_q_clusters, value_dim)
    slope = q_centroids.new_zeros(batch, kv_heads, head_dim, value_dim)
    sharing = q_heads // max(kv_heads, 1)
    sizes = k_offsets.diff(dim=-1)[..., :num_k_clusters]
    for b in range(batch):
        for g in range(kv_heads):
            heads = slice(g * sharing, (g + 1) * sharing)
            skipped = ~block_map[b, heads, :num_q_clusters, :num_k_clusters].flatten(0, 1) & (sizes[b, g] > 0)
            # Weights sum to one over what a query skips.
            total = log_mass[b, heads, :, :num_k_clusters].flatten(0, 1).masked_fill(~skipped, -math.inf).logsumexp(1)
            bias = torch.where(skipped, -total.unsqueeze(1), -math.inf).t().contiguous()
            queries = q_centroids[b, heads].flatten(0, 1).t() * scale
            weighted = queries.new_zeros(queries.shape[1], value_dim)
            cluster = torch.repeat_interleave(torch.arange(num_k_clusters), sizes[b, g])
            tokens_per_tile = max(64, SCORES_PER_TILE // queries.shape[1])
            for first in range(0, cluster.shape[0], tokens_per_tile):
                own = cluster[first : first + tokens_per_tile]
                keys = key[b, g, first : first + own.shape[0]].to(torch.float32)
                spread = value[b, g, first : first + own.shape[0]] - v_centroids[b, g].index_select(0, own)
                slope[b, g].addmm_((keys - k_centroids[b, g].index_select(0, own)).t(), spread)
                weights = bias.index_select(0, own).addmm_(keys, queries).clamp_(min=LEAST_EXPONENT).exp_()
                weighted.addmm_(weights.t(), spread)
            weighted.masked_fill_(~skipped.any(dim=1, keepdim=True), 0.0)
            residual[b, heads] = weighted.view(sharing, num_q_clusters, value_dim)
            slope[b, g].mul_(scale / max(cluster.shape[0], 1))
    return residual, slope


class Skipped(NamedTuple):
    """What the skipped clusters are to the queries of one head: logits are s q.keys + bias of the query's cluster
    [Cq, Ck], -inf where nothing is skipped; values [Ck, Dv], to which offset [Cq, Dv] of the query's cluster and
    q @ slope [D, Dv] are added."""

    keys: Tensor
    bias: Tensor
    values: Tensor
    offset: Tensor
    slope: Tensor


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
) -> tuple[Tensor, Tensor]:
    """Selected keys exactly, skipped clusters to first order; see ``ops.first_order_attention``. Workspace as of
    ``block_sparse_attention``."""
    query, key, value = by_cluster(query, key, value, q_order, k_order)
    tokens = (query, key, value)
    out, lse = attend_to_blocks(tokens, q_offsets, k_offsets, block_map, scale, None, torch.float32)
    num_q_clusters, num_k_clusters = q_centroids.shape[2], k_centroids.shape[2]
    filled = k_offsets.diff(dim=-1)[..., :num_k_clusters] > 0
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g = h // (query.shape[1] // key.shape[1])
            skips = ~block_map[b, h, :num_q_clusters, :num_k_clusters] & filled[b, g]
            # An empty cluster's centroid may be anything.
            keys = torch.where(filled[b, g].unsqueeze(1), k_centroids[b, g], 0.0)
            bias = log_mass[b, h, :, :num_k_clusters] - scale * (q_centroids[b, h] @ keys.t())
            bias.masked_fill_(~skips, -math.inf)
            offset = residual[b, h] - q_centroids[b, h] @ slope[b, g]
            skipped = Skipped(keys, bias, v_centroids[b, g], offset, slope[b, g])
            _merge_skipped(query[b, h], q_offsets[b, h].diff()[:num_q_clusters], skipped, scale, out[b, h], lse[b, h])
    return by_token(out.to(query.dtype), lse, q_order)


def _merge_skipped(query: Tensor, sizes: Tensor, skipped: Skipped, scale: float, out: Tensor, lse: Tensor) -> None:
    """Add the skipped clusters to the rows of query clusters of these sizes: out [N, Dv] and lse [N], in place."""
    cluster = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)
    keys = skipped.keys.t()
    rows_per_tile = max(64, SCORES_PER_TILE // keys.shape[1])
    for first in range(0, cluster.shape[0], rows_per_tile):
        tile = slice(first, min(first + rows_per_tile, cluster.shape[0]))
        own, rows = cluster[tile], query[tile].to(torch.float32)
        weights = skipped.bias.index_select(0, own).addmm_(rows, keys, alpha=scale)
        # A row without any key has -inf everywhere.
        largest = torch.maximum(weights.amax(dim=1), lse[tile]).clamp_(min=torch.finfo(torch.float32).min)
        weights.sub_(largest.unsqueeze(1)).clamp_(min=LEAST_EXPONENT).exp_()
        skips = weights.sum(dim=1)
        # Rows that skip nothing take nothing from their cluster, which may know a NaN.
        skips_nothing = skips < NO_SHARE
        skips.masked_fill_(skips_nothing, 0.0)
        exact = (lse[tile] - largest).exp_()
        total = exact + skips
        lse[tile] = total.log() + largest
        total.masked_fill_(total == 0, 1.0)
        added = skipped.offset.index_select(0, own).addmm_(rows, skipped.slope)
        added.mul_(skips.unsqueeze(1)).addmm_(weights, skipped.values)
        added.div_(total.unsqueeze(1)).masked_fill_(skips_nothing.unsqueeze(1), 0.0)
        out[tile] = out[tile].mul_((exact / total).unsqueeze(1)).add_(added)
