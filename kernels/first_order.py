"""The ``svg2::`` ops of first-order compensation and of one budget for all heads of a layer. Shapes are those of
``ops.py``.

What they compute together, per query cluster i with centroid q_i and for key clusters j of n_j keys with centroid c_j
and mean value v_j (s: the scale, sums over the keys t of j):

    m_ij = sum_t exp(s q_i.k_t)                                  the exact mass of a block      block_estimates
    e_ij = | sum_t (exp(s q_i.k_t) - exp(s q_i.c_j)) (v_t - o_i) |^2   what its mean would miss      block_estimates
    u_ij = s^2 sum_d var_id (c_jd - cbar_id)^2                   how much its logit varies      cluster_variances
    P_mj                                     its share of a query m far from q_i                farthest_members
    selected: the largest e_ij / (Z_i^2 n_j) (exp(min(8, u_ij / 2)) + sum_m (P_mj / P_ij)^2 / n_i) of all heads
                                                                                          select_blocks_of_layer
    D_i = sum of skipped j, t: exp(s q_i.k_t) (v_t - v_j) / sum of skipped j: m_ij              first_order_terms
          the same of all clusters is there before anything is selected                     first_order_estimates
    G = s sum_j sum_t (k_t - c_j) (v_t - v_j)' / N               one matrix per head            first_order_terms
    a skipped j is one key of logit s (q - q_i).c_j + ln m_ij
        and of value v_j + D_i + (q - q_i) G                                                first_order_attention

At q = q_i that is exact, whatever is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svg2_compile.kernels import contracts
from svg2_compile.kernels.definition import define

__all__ = [
    "FAR_MEMBERS",
    "block_estimates",
    "cluster_variances",
    "estimates_for_terms",
    "farthest_members",
    "first_order_attention",
    "first_order_estimates",
    "first_order_terms",
    "select_blocks_of_layer",
    "starts_from_all_clusters",
]

FAR_MEMBERS = 8
"""Queries of a cluster that the selection looks at one by one. 4, 8 and 16 of them leave 0.85, 0.81 and 0.79 of the
error at 10 % density (docs/quality.md); each costs what one query cluster more would."""


def starts_from_all_clusters(device: torch.device) -> bool:
    """Whether ``first_order_terms`` is to know what all clusters leave out, from ``first_order_estimates``. On a CPU
    that spares it most keys; on a GPU some query of a tile selects nearly every key, so that nothing is spared."""
    return device.type == "cpu"


@define(contracts.CLUSTER_VARIANCES)
def cluster_variances(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor) -> Tensor:
    """Variance of each cluster's members in every dimension: the mean of (x - centroid)^2, float32 [B, H, C, D].

    x [B, H, N, D] in token order, with order int32 [B, H, N] and offsets int32 [B, H, C + 3] of ``cluster_order``;
    centroids float32 [B, H, C, D]. 0 for an empty cluster.
    """
    return torch.empty_like(centroids, memory_format=torch.contiguous_format)


@define(contracts.FARTHEST_MEMBERS)
def farthest_members(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, count: int) -> Tensor:
    """How the ``count`` members of each cluster that are farthest from its centroid differ from it: x - centroid,
    float32 [B, H, C, count, D], the farthest first, of two that are equally far the earlier in the order.

    The arguments are those of ``cluster_variances``. 0 where a cluster has no so many members.
    """
    return centroids.new_empty((*centroids.shape[:3], count, centroids.shape[3]))


@define(contracts.BLOCK_ESTIMATES)
def block_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What every key block is to every query centroid, streamed over the keys: nothing of size Cq x N is in memory.

    Permuted key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv] with k_offsets int32 [B, Hkv, Ck + 3]; centroids float32
    [B, Hq, Cq, D], [B, Hkv, Ck, D], [B, Hkv, Ck, Dv]. Returns

        log_mass  float32 [B, Hq, Cq, Ck + 2]  ln sum_t exp(s q_i.k_t) over the keys of a block: clusters, then context;
                                               -inf where it is empty, and for the null block
        log_error float32 [B, Hq, Cq, Ck]      ln e_ij of ``select_blocks_by_error``; -inf where it is empty or exact
    """
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    num_k_clusters = k_centroids.shape[2]
    log_mass = q_centroids.new_empty((batch, q_heads, num_q_clusters, num_k_clusters + 2))
    return log_mass, q_centroids.new_empty((batch, q_heads, num_q_clusters, num_k_clusters))


@define(contracts.BLOCK_ESTIMATES)
def first_order_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``block_estimates``, and what the means of all clusters leave out: for ``first_order_terms`` to start from.

    v_centroids are the means of the values of each cluster. Returns log_mass and log_error as ``block_estimates``, and

        residual  float32 [B, Hq, Cq, Dv]  the mean of v_t - v_j over the keys of all clusters, weighted by
                                           exp(s q_i.k_t): D_i of ``first_order_terms`` if nothing is selected

    It is a sum of sums over blocks that the errors need anyhow.
    """
    mass_shape = (*q_centroids.shape[:3], k_centroids.shape[2] + 2)
    log_mass, log_error = q_centroids.new_empty(mass_shape), q_centroids.new_empty((*mass_shape[:3], mass_shape[3] - 2))
    return log_mass, log_error, q_centroids.new_empty((*q_centroids.shape[:3], v_centroids.shape[3]))


def estimates_for_terms(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The op whose log_mass, log_error and, where ``first_order_terms`` starts from it, residual of all clusters are to
    be taken on a device."""
    return first_order_estimates if starts_from_all_clusters(device) else block_estimates


@define(contracts.SELECT_BLOCKS_OF_LAYER)
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
    """Which key blocks each query block attends to, under one budget for all heads of a batch item.

    log_mass and log_error as of ``block_estimates``, q_variances float32 [B, Hq, Cq, D] as of ``cluster_variances``,
    k_centroids float32 [B, Hkv, Ck, D], q_sizes int32 [B, Hq, Cq], k_offsets int32 [B, Hkv, Ck + 3]; density float32
    [], on the device: it may change from call to call and is never read back; far_members float32 [B, Hq, Cq, S, D] as
    of ``farthest_members``. Blocks (head, i, j) are taken by

        ln e_ij - 2 ln Z_i - ln n_j + ln(exp(min(8, u_ij / 2)) + sum_m (P_mj / P_ij)^2 / n_i)
        u_ij = s^2 sum_d var_id (c_jd - cbar_id)^2
        P_mj = exp(s (q_m - q_i).c_j) m_ij / (sum over j of that, and the mass of the context)

    where Z_i is the mass of the whole row, context included, P_ij = m_ij / Z_i, and cbar_i the mean of c_j weighted by
    the masses m_ij: u_ij is the variance of j's logit among the queries of i. A mean over all queries of i of the
    square of what they attend to j is what the factor in brackets stands for: measured for the few that are farthest
    from q_i, by far most often those that attend sharply where the others do not, and expected for the others. Without
    far_members it is the first term alone. The largest are kept until their pairs n_i n_j first reach density * (all
    pairs of clusters); ties go to the lower head, row and column. A row may keep nothing.

    Returns block_map bool [B, Hq, Cq + 2, Ck + 2]: context and null blocks as in ``select_blocks``. No empty cluster is
    kept and none whose error is 0, unless density >= 1 keeps everything. A row with a NaN or infinite estimate keeps
    every cluster with keys, outside the budget, so that NaN shows as in dense attention.
    """
    return log_mass.new_empty((*log_mass.shape[:2], log_mass.shape[2] + 2, log_mass.shape[3]), dtype=torch.bool)


@define(contracts.FIRST_ORDER_TERMS)
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
    """What the means of skipped clusters leave out, at a query centroid and next to it.

    The arguments are those of ``block_estimates``, its log_mass, and block_map bool [B, Hq, Cq + 2, Ck + 2];
    residual_of_all float32 [B, Hq, Cq, Dv] as of ``first_order_estimates``. Returns

        residual float32 [B, Hq, Cq, Dv]  D_i, the mean of v_t - v_j over the keys of skipped clusters, weighted by
                                          exp(s q_i.k_t); 0 where nothing is skipped
        slope    float32 [B, Hkv, D, Dv]  G = s sum_j sum_t (k_t - c_j) (v_t - v_j)' / N over all N clustered keys

    Both are sums of differences to the means: nothing large cancels. Where residual_of_all is known, an implementation
    may take what selected clusters contribute off it, instead of reading all keys of the skipped ones: for queries that
    skip so much of their mass that nothing large cancels then either.
    """
    residual = q_centroids.new_empty((*q_centroids.shape[:3], v_centroids.shape[3]))
    return residual, q_centroids.new_empty((*k_centroids.shape[:2], k_centroids.shape[3], v_centroids.shape[3]))


@define(contracts.FIRST_ORDER_ATTENTION)
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
    """Softmax attention over the keys of selected blocks, and over skipped clusters to first order.

    As ``block_sparse_attention``, but for a query q of cluster i every non-empty cluster j that it skips joins the
    softmax as one key of logit s (q - q_i).c_j + ln m_ij (log_mass [B, Hq, Cq, Ck + 2]) and of value
    v_j + D_i + (q - q_i) G (residual [B, Hq, Cq, Dv], slope [B, Hkv, D, Dv]). So with share(q) the part of the row's
    sum of exponentials that is skipped,

        out(q) = softmax over selected keys and skipped clusters (v_t, v_j) + share(q) (D_i + (q - q_i) G)

    Nothing is added where nothing is skipped: with all clusters selected this is dense attention, and a query at its
    cluster's centroid gets what dense attention gives it, whatever is skipped. Context and null blocks are not
    compensated.

    Returns out and lse as ``block_sparse_attention``.
    """
    batch, q_heads, num_queries, _ = query.shape
    lse = query.new_empty((batch, q_heads, num_queries), dtype=torch.float32)
    if q_order is None:
        return query.new_empty((batch, q_heads, num_queries, value.shape[3])), lse
    return query.new_empty((batch, num_queries, q_heads, value.shape[3])).transpose(1, 2), lse
