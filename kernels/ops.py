"""The ``svg2::`` ops: schemas, fake kernels, validation and dispatch by device. Imports without Triton.

Every op is a pure function on 4-D ``[B, H, N, D]`` tensors of any strides: it aliases none of its inputs, its output
shapes never depend on data, and to a compiler it is opaque. B batch, Hq/Hkv query and key/value heads (Hq a multiple
of Hkv; query head h reads key head ``h // (Hq // Hkv)``), N tokens, D head_dim, Cq/Ck query and key clusters. The
**blocks** of an order are its C clusters, then block C with the context tokens, then block C + 1, the null block,
with masked tokens; each may be empty. ``offsets`` int32 [B, H, C + 3] are the blocks' boundaries.

A function below ``@define`` is three things at once: the op's signature, its documentation, and its fake kernel, whose
body makes empty results of the right shape, dtype and layout (``definition.py``). What a call must keep to is a table
in ``contracts.py``. The ops of first-order compensation, and of budgets that a layer's heads share, are in
``first_order.py``; the one that measures errors is in ``sampled_error.py``. Which implementation runs is one table in
``dispatch.py``; ``use_implementation`` asks for one explicitly, and such a request never falls back. The ops are for
inference: they have no autograd formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svg2_compile.kernels import contracts
from svg2_compile.kernels.definition import define
from svg2_compile.kernels.dispatch import implementation_for, use_implementation
from svg2_compile.kernels.first_order import (
    block_estimates,
    cluster_variances,
    farthest_members,
    first_order_attention,
    first_order_estimates,
    first_order_terms,
    select_blocks_of_layer,
)
from svg2_compile.kernels.sampled_error import sampled_error

__all__ = [
    "block_density",
    "block_estimates",
    "block_sparse_attention",
    "cluster_means",
    "cluster_order",
    "cluster_variances",
    "farthest_members",
    "first_order_attention",
    "first_order_estimates",
    "first_order_terms",
    "implementation_for",
    "kmeans",
    "permute_tokens",
    "sampled_error",
    "select_blocks",
    "select_blocks_by_error",
    "select_blocks_of_layer",
    "unpermute_tokens",
    "use_implementation",
]


@define(contracts.KMEANS)
def kmeans(
    x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's k-means with Euclidean distance, per batch and head (SVG2 section 4.1).

    x [B, H, N, D] float32, bfloat16 or float16; centroids float32 [B, H, C, D] with 1 <= C <= N; seeded bool []:
    where False, ``centroids`` is ignored and C tokens spread evenly over the (valid) tokens are the start; iters >=
    1; valid bool [B, 1 or H, N]: tokens that are False carry no mass and are in no size.

    Returns labels int32 [B, H, N] of the last assignment, always in [0, C) (any value for invalid tokens); centroids
    float32 [B, H, C, D], the means of exactly those labels, or what they were where a cluster is empty; sizes int32
    [B, H, C]. A token with NaN or inf makes its cluster's centroid non-finite; a non-finite centroid is chosen by no
    other token. Raises TypeError or ValueError on inputs out of contract, such as no clusters or more clusters than
    tokens.
    """
    batch, heads, num_tokens, head_dim = x.shape
    num_clusters = centroids.shape[2]
    labels = x.new_empty((batch, heads, num_tokens), dtype=torch.int32)
    means = x.new_empty((batch, heads, num_clusters, head_dim), dtype=torch.float32)
    sizes = x.new_empty((batch, heads, num_clusters), dtype=torch.int32)
    return labels, means, sizes


@define(contracts.CLUSTER_ORDER)
def cluster_order(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The order that makes every block contiguous, and the blocks' boundaries.

    labels int32 [B, H, Nv] of the video tokens [start, start + Nv) of a sequence of ``num_tokens``; every other token
    is context; tokens whose valid bool [B, 1 or H, num_tokens] is False go to the null block, wherever they are.

    Returns order int32 [B, H, num_tokens], where order[..., r] is the token at permuted position r (stable: within a
    block tokens keep their order), and offsets int32 [B, H, num_clusters + 3].
    """
    batch, heads, _ = labels.shape
    order = labels.new_empty((batch, heads, num_tokens), dtype=torch.int32)
    return order, labels.new_empty((batch, heads, num_clusters + 3), dtype=torch.int32)


@define(contracts.SELECT_BLOCKS)
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
    """Which key blocks each query block attends to, by estimated softmax mass (SVG2 section 4.2).

    q_centroids float32 [B, Hq, Cq, D], k_centroids float32 [B, Hkv, Ck, D], sizes int32 [B, H, C]. With
    P_ij = softmax_j(scale q_i.k_j + ln n_j), a row keeps its largest P until they first sum to ``top_p``, and at least
    ceil(min_k_ratio Ck) clusters; top_p >= 1 keeps every cluster. With ``density`` in [0, 1], top_p and min_k_ratio are
    ignored and a row keeps its largest P until their keys first reach density * (all clustered keys).

    Returns block_map bool [B, Hq, Cq + 2, Ck + 2]: the context row and column are True, the null column False, the
    null row False but for the context column. Every row keeps at least one non-empty cluster if there is one, and no
    empty one unless it keeps all. A row with a non-finite score keeps every cluster, so that NaN shows as in dense
    attention.
    """
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    shape = (batch, q_heads, num_q_clusters + 2, k_centroids.shape[2] + 2)
    return q_centroids.new_empty(shape, dtype=torch.bool)


@define(contracts.TOKENS_AND_ORDER)
def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Row r of the result is token order[r]: x [B, H, N, D], order int32 [B, H, N] -> [B, H, N, D], contiguous;
    exact."""
    return x.new_empty(x.shape)


@define(contracts.TOKENS_AND_ORDER)
def unpermute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of ``permute_tokens``: token order[r] of the result is row r of x; exact.

    x [B, H, N, D], order int32 [B, H, N] -> [B, H, N, D], laid out as a contiguous [B, N, H, D] (what the output
    projection reads next), seen transposed.
    """
    batch, heads, num_tokens, head_dim = x.shape
    return x.new_empty((batch, num_tokens, heads, head_dim)).transpose(1, 2)


@define(contracts.CLUSTER_MEANS)
def cluster_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean row of each cluster: permuted x [B, H, N, D], offsets int32 [B, H, C + 3] -> float32 [B, H, C, D]; 0 if
    empty."""
    batch, heads, _, head_dim = x.shape
    return x.new_empty((batch, heads, offsets.shape[2] - 3, head_dim), dtype=torch.float32)


@define(contracts.BLOCK_SPARSE_ATTENTION)
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
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over exactly the keys of its selected key blocks (SVG2 section 4.3).

    Query [B, Hq, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv] of one dtype, permuted, or in token order with the
    order that would permute them: q_order int32 [B, Hq, Nq] for query and both results, k_order int32 [B, Hkv, Nk] for
    key and value. q_offsets int32 [B, Hq, Cq + 3], k_offsets int32 [B, Hkv, Ck + 3]; block_map bool [B, Hq, Cq + 2,
    Ck + 2]. With k_centroids [B, Hkv, Ck, D] and v_centroids [B, Hkv, Ck, Dv], float32, every non-empty cluster j that
    a row skips joins the same softmax as one key k_j with value v_j and bias ln n_j (EAR's compensation); context and
    null blocks never do. workspace_mb: MiB that a GPU may use for lists of keys; an error where it is too little.

    Returns out [B, Hq, Nq, Dv] in query's dtype (contiguous; with q_order laid out as ``unpermute_tokens`` does) and
    lse float32 [B, Hq, Nq], the natural log of the sum of exponentials, compensation included. A row without any key
    has out 0 and lse -inf. Accumulation is float32.
    """
    batch, q_heads, num_queries, _ = query.shape
    lse = query.new_empty((batch, q_heads, num_queries), dtype=torch.float32)
    if q_order is None:
        return query.new_empty((batch, q_heads, num_queries, value.shape[3])), lse
    return query.new_empty((batch, num_queries, q_heads, value.shape[3])).transpose(1, 2), lse


@define(contracts.SELECT_BLOCKS_BY_ERROR)
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
    """Which key blocks to compute exactly when the others are compensated (EAR, arXiv 2603.08982, error-aware
    routing).

    Permuted key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv] with k_offsets int32 [B, Hkv, Ck + 3]; centroids float32;
    the other arguments as in ``select_blocks``. Blocks are ranked by error per key e_ij / n_j, where

        e_ij = | sum over keys t of cluster j of (exp(scale q_i.k_t) - exp(scale q_i.k_j)) (v_t - o_i) |^2

    and o_i is what q_i gets if every cluster is compensated: to first order, and up to a factor that a row shares, the
    error in the output of q_i if cluster j is compensated. (The published estimate adds the squares of single keys'
    errors, which largely cancel within a cluster; what that is worth is measured in docs/quality.md.) Blocks are kept
    until their keys first reach the row's budget: the number of keys that ``select_blocks`` would keep, or density *
    (all clustered keys).

    Returns block_map bool [B, Hq, Cq + 2, Ck + 2] with the guarantees of ``select_blocks``.
    """
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    shape = (batch, q_heads, num_q_clusters + 2, k_centroids.shape[2] + 2)
    return q_centroids.new_empty(shape, dtype=torch.bool)


@define(contracts.BLOCK_DENSITY)
def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected (query, key) pairs over all pairs, float32 [B, Hq]; 0 where there are no pairs."""
    return q_offsets.new_empty(q_offsets.shape[:2], dtype=torch.float32)
