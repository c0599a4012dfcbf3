"""What key clusters are to query centroids on the CPU: exact masses, and the error of compensation (EAR)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.cluster import gather_rows
from svg2_compile.kernels.tuning.lookup import tuned

ROWS = 2048  # at a time, so that they stay in the cache


class KeyHead(NamedTuple):
    """One head of clustered keys and values: permuted tokens [N, D] and [N, Dv], means float32 [Ck, D] and [Ck, Dv],
    sizes int [Ck]."""

    key: Tensor
    value: Tensor
    k_centroids: Tensor
    v_centroids: Tensor
    sizes: Tensor


def block_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact masses and errors of compensation; see ``ops.block_estimates``."""
    return first_order_estimates(key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale)[:2]


def first_order_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and what all means leave out; see ``ops.first_order_estimates``."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    kv_heads, num_k_clusters = k_centroids.shape[1:3]
    log_mass = q_centroids.new_full((batch, q_heads, num_q_clusters, num_k_clusters + 2), -math.inf)
    log_error = q_centroids.new_empty(batch, q_heads, num_q_clusters, num_k_clusters)
    residual = q_centroids.new_empty(batch, q_heads, num_q_clusters, v_centroids.shape[3])
    sharing = q_heads // max(kv_heads, 1)
    for b in range(batch):
        for g in range(kv_heads):
            heads = slice(g * sharing, (g + 1) * sharing)
            queries, offsets = q_centroids[b, heads].flatten(0, 1), k_offsets[b, g]
            sizes = offsets.diff()[:num_k_clusters]
            head = KeyHead(key[b, g], value[b, g], k_centroids[b, g], v_centroids[b, g], sizes)
            mass, error, left_out = head_estimates(queries, head, scale)
            log_mass[b, heads, :, :num_k_clusters] = mass.view(sharing, num_q_clusters, -1)
            log_error[b, heads] = error.view(sharing, num_q_clusters, -1)
            residual[b, heads] = left_out.view(sharing, num_q_clusters, -1)
            context = key[b, g, int(offsets[num_k_clusters]) : int(offsets[num_k_clusters + 1])].to(torch.float32)
            context_mass = (queries @ context.t()).mul_(scale).logsumexp(dim=1)
            log_mass[b, heads, :, num_k_clusters] = context_mass.view(sharing, num_q_clusters)
    return log_mass, log_error, residual


class LeftOut:
    """What the means of all clusters so far leave out at queries [m, D]: sum over j, t of exp(s q.k_t - shift)
    (v_t - v_j), and the sum of these exponentials; the shift is the largest exponent of a cluster."""

    def __init__(self, queries: Tensor, value_dim: int) -> None:
        self.sums = queries.new_zeros(queries.shape[0], value_dim)
        self.mass = queries.new_zeros(queries.shape[0], 1)
        self.shift = queries.new_full((queries.shape[0], 1), torch.finfo(torch.float32).min)

    def add(self, sums: Tensor, mass: Tensor, exponent: Tensor) -> None:
        """Clusters with sums [c, m, Dv] and mass [c, m], times e^exponent [c, m]."""
        shift = torch.maximum(self.shift, exponent.amax(dim=0).unsqueeze(1))
        before, now = torch.exp(self.shift - shift), torch.exp(exponent - shift.t())
        self.sums.mul_(before).add_(torch.einsum("cm,cmd->md", now, sums))
        self.mass.mul_(before).add_((now * mass).sum(dim=0).unsqueeze(1))
        self.shift = shift

    def residual(self) -> Tensor:
        """The mean over all clusters [m, Dv]; 0 where there are no keys."""
        return self.sums / self.mass.masked_fill(self.mass == 0, 1.0)


def head_estimates(queries: Tensor, head: KeyHead, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """ln sum_t exp(s q.k_t) and ln |sum_t (exp(s q.k_t) - exp(s q.k_j)) (v_t - o)|^2 for queries [m, D] and the
    clusters of one head, float32 [m, Ck] each; and what the means of all clusters leave out, [m, Dv].

    o is the output of q if every cluster is compensated. With d_t = s q.(k_t - k_j) and the largest of them (or 0) as
    shift, the weights are exp(s q.k_j + shift) times w_t = exp(d_t - shift) - exp(-shift): nothing overflows. And
    sum_t w_t (v_t - o) = sum_t w_t (v_t - v_j) + (sum_t w_t) (v_j - o): a matrix product per cluster, of small numbers.
    """
    scaled_queries, sizes = queries * scale, head.sizes
    mean_scores = scaled_queries @ head.k_centroids.t()
    # An empty cluster's centroid may be anything.
    log_mass = (mean_scores + sizes.log()).masked_fill(sizes == 0, -math.inf)
    outputs = torch.softmax(log_mass, dim=-1) @ head.v_centroids
    log_errors = queries.new_full((sizes.shape[0], queries.shape[0]), -math.inf)
    log_masses = torch.full_like(log_errors, -math.inf)
    key_differences = _differences_to_means(head.key, head.k_centroids, sizes)
    value_differences = _differences_to_means(head.value, head.v_centroids, sizes)
    # Floats of one [query clusters, tokens] tile: a few MiB, whatever the number of tokens.
    num_tokens, head_dim = head.key.shape
    left_out = LeftOut(queries, head.value.shape[1])
    errors_per_tile = tuned("cpu_error", head.key.device, head.key.dtype, head_dim, num_tokens)["ERRORS_PER_TILE"]
    for clusters, rows in _tiles_of_clusters(sizes, max(1, errors_per_tile // queries.shape[0])):
        # Padding is at the centroid: its weight is exactly 0.
        distance = gather_rows(key_differences, rows) @ scaled_queries.t()
        shift = distance.amax(dim=1, keepdim=True).clamp_(min=0.0)
        at_mean = torch.exp(-shift)
        weights = distance.sub_(shift).exp_().sub_(at_mean)
        error = weights.transpose(1, 2) @ gather_rows(value_differences, rows)
        mean_to_output = head.v_centroids.index_select(0, clusters).unsqueeze(1) - outputs
        excess, shift = weights.sum(dim=1), shift.squeeze(1)
        mass = at_mean.squeeze(1) * sizes[clusters].unsqueeze(1) + excess
        left_out.add(error, mass, mean_scores.t().index_select(0, clusters) + shift)
        error.addcmul_(excess.unsqueeze(-1), mean_to_output)
        log_errors[clusters] = error.square_().sum(dim=-1).log_().add_(shift, alpha=2)
        log_masses[clusters] = mass.log_().add_(shift)
    return log_masses.t() + mean_scores, log_errors.t() + 2 * mean_scores, left_out.residual()


def _differences_to_means(tokens: Tensor, means: Tensor, sizes: Tensor) -> Tensor:
    """Clustered tokens [n, D] less the means [C, D] of their clusters, and a last row of zeros: float32 [m + 1, D], of
    the m <= n tokens in clusters of these sizes [C]."""
    cluster = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)
    differences = means.new_empty(cluster.shape[0] + 1, means.shape[1])
    differences[-1] = 0.0
    for own, rows, out in zip(
        cluster.split(ROWS), tokens[: cluster.shape[0]].split(ROWS), differences[:-1].split(ROWS), strict=True
    ):
        torch.sub(rows.to(torch.float32), means.index_select(0, own), out=out)
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
