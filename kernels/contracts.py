"""What each op takes: one contract per op, applied from top to bottom. The rules are those of ``validation.py``.

The letters are those of ``ops.py``. A rule that only one or two contracts need is a function here: it gets the call,
with its arguments by name and the sizes that the letters stand for.
"""

from __future__ import annotations

import torch

from svg2_compile.kernels.validation import (
    Call,
    Contract,
    Rule,
    at_least_one,
    dimension,
    finite_scale,
    in_range,
    tensor,
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
BOOL = (torch.bool,)


# --------------------------------------------------------------------------------------------- rules of a few contracts
def no_more_clusters_than_tokens(call: Call) -> None:
    num_clusters, num_tokens = call.sizes["C"], call.sizes["N"]
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(
            f"svg2::{call.op}: centroids has {num_clusters} clusters for {num_tokens} tokens; "
            f"valid: 1 to {num_tokens} clusters (no more than tokens)"
        )


def video_within_sequence(call: Call) -> None:
    start, num_tokens, video_tokens = call.arguments["start"], call.arguments["num_tokens"], call.sizes["video tokens"]
    if start < 0 or start + video_tokens > num_tokens:
        raise ValueError(
            f"svg2::{call.op}: start is {start} with {video_tokens} video tokens in num_tokens = {num_tokens}; "
            f"valid: 0 <= start and start + {video_tokens} <= num_tokens"
        )


def clusters_on_both_sides(call: Call) -> None:
    num_q_clusters, num_k_clusters = call.sizes["Cq"], call.sizes["Ck"]
    if num_q_clusters < 1 or num_k_clusters < 1:
        raise ValueError(
            f"svg2::{call.op}: q_centroids has {num_q_clusters} clusters and k_centroids {num_k_clusters}; "
            "valid: at least 1 of each"
        )


def heads_divide(call: Call) -> None:
    """The query heads divide evenly among the key heads."""
    num_q_heads, num_kv_heads = call.sizes["Hq"], call.sizes["Hkv"]
    if num_kv_heads == 0 and num_q_heads == 0:
        return
    if num_kv_heads == 0 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"svg2::{call.op}: query has {num_q_heads} heads and key has {num_kv_heads}; "
            "valid: a number of query heads that is a multiple of the number of key heads"
        )


def both_centroids_or_neither(call: Call) -> None:
    missing = [name for name in ("k_centroids", "v_centroids") if call.arguments[name] is None]
    if len(missing) == 1:
        raise ValueError(f"svg2::{call.op}: {missing[0]} is None; valid: both centroids (compensation) or neither")


def offsets(name: str, shape: str) -> tuple[Rule, Rule]:
    """Offsets that say how many clusters there are; elsewhere their length follows from other tensors."""

    def some_clusters(call: Call) -> None:
        boundaries = call.arguments[name].shape[2]
        if boundaries < 4:  # of one cluster, the context block and the null block
            raise ValueError(f"svg2::{call.op}: {name} has {boundaries} boundaries; valid: at least 4 (clusters + 3)")

    return tensor(name, INT32, shape, meaning="[B, H, clusters + 3]"), some_clusters


# ------------------------------------------------------------------------------------------------- contracts, and parts
CENTROID_PAIR: Contract = (
    tensor("q_centroids", FLOAT32, "[B, Hq, Cq, D]"),
    tensor("k_centroids", FLOAT32, "[B, Hkv, Ck, D]"),
    clusters_on_both_sides,
    heads_divide,
)

SELECTION_LIMITS: Contract = (
    finite_scale,
    in_range("top_p", 0.0, float("inf")),  # 1 and above: every cluster
    in_range("min_k_ratio", 0.0, 1.0),
    in_range("density", 0.0, 1.0),
)

KMEANS: Contract = (
    tensor("x", FLOATING, "[B, H, N, D]"),
    tensor("centroids", FLOAT32, "[B, H, C, D]"),
    no_more_clusters_than_tokens,
    tensor("seeded", BOOL, "[]", meaning="a scalar tensor []"),
    at_least_one("iters"),
    tensor("valid", BOOL, "[B, 1 or H, N]"),
)

CLUSTER_ORDER: Contract = (
    tensor("labels", INT32, "[B, H, video tokens]"),
    at_least_one("num_clusters"),
    video_within_sequence,
    dimension("N", "num_tokens"),
    tensor("valid", BOOL, "[B, 1 or H, N]"),
)

# Of permute_tokens and unpermute_tokens.
TOKENS_AND_ORDER: Contract = (
    tensor("x", FLOATING, "[B, H, N, D]"),
    tensor("order", INT32, "[B, H, N]"),
)

CLUSTER_MEANS: Contract = (
    tensor("x", FLOATING, "[B, H, N, D]"),
    *offsets("offsets", "[B, H, C + 3]"),
)

SELECT_BLOCKS: Contract = (
    *CENTROID_PAIR,
    tensor("q_sizes", INT32, "[B, Hq, Cq]", meaning="[B, H, clusters] of its centroids"),
    tensor("k_sizes", INT32, "[B, Hkv, Ck]", meaning="[B, H, clusters] of its centroids"),
    *SELECTION_LIMITS,
)

SELECT_BLOCKS_BY_ERROR: Contract = (
    *CENTROID_PAIR,
    tensor("key", FLOATING, "[B, Hkv, Nk, D]"),
    tensor("value", FLOATING, "[B, Hkv, Nk, Dv]"),
    tensor("k_offsets", INT32, "[B, Hkv, Ck + 3]"),
    tensor("v_centroids", FLOAT32, "[B, Hkv, Ck, Dv]"),
    tensor("q_sizes", INT32, "[B, Hq, Cq]"),
    *SELECTION_LIMITS,
)

CLUSTER_VARIANCES: Contract = (
    tensor("x", FLOATING, "[B, H, N, D]"),
    tensor("order", INT32, "[B, H, N]", meaning="[B, H, N] of its tokens"),
    *offsets("offsets", "[B, H, C + 3]"),
    tensor("centroids", FLOAT32, "[B, H, C, D]"),
)

FARTHEST_MEMBERS: Contract = (*CLUSTER_VARIANCES, at_least_one("count"))

CLUSTERED_TOKENS: Contract = (
    *CENTROID_PAIR,
    tensor("key", FLOATING, "[B, Hkv, Nk, D]"),
    tensor("value", FLOATING, "[B, Hkv, Nk, Dv]"),
    tensor("k_offsets", INT32, "[B, Hkv, Ck + 3]"),
    tensor("v_centroids", FLOAT32, "[B, Hkv, Ck, Dv]"),
)

BLOCK_ESTIMATES: Contract = (*CLUSTERED_TOKENS, finite_scale)

SELECT_BLOCKS_OF_LAYER: Contract = (
    tensor("q_variances", FLOAT32, "[B, Hq, Cq, D]"),
    tensor("k_centroids", FLOAT32, "[B, Hkv, Ck, D]"),
    heads_divide,
    tensor("log_mass", FLOAT32, "[B, Hq, Cq, Ck + 2]"),
    tensor("log_error", FLOAT32, "[B, Hq, Cq, Ck]"),
    tensor("q_sizes", INT32, "[B, Hq, Cq]"),
    tensor("k_offsets", INT32, "[B, Hkv, Ck + 3]"),
    finite_scale,
    tensor("density", FLOAT32, "[]", meaning="a scalar tensor []"),
    tensor("far_members", FLOAT32, "[B, Hq, Cq, S, D]"),
)

FIRST_ORDER_TERMS: Contract = (
    *CLUSTERED_TOKENS,
    tensor("log_mass", FLOAT32, "[B, Hq, Cq, Ck + 2]"),
    tensor("block_map", BOOL, "[B, Hq, Cq + 2, Ck + 2]"),
    finite_scale,
    tensor("residual_of_all", FLOAT32, "[B, Hq, Cq, Dv]"),
)

BLOCK_SPARSE_ATTENTION: Contract = (
    tensor("query", FLOATING, "[B, Hq, Nq, D]"),
    tensor("key", FLOATING, "[B, Hkv, Nk, D]", like="query"),
    heads_divide,
    tensor("value", FLOATING, "[B, Hkv, Nk, Dv]", like="query"),
    *offsets("q_offsets", "[B, Hq, Cq + 3]"),
    *offsets("k_offsets", "[B, Hkv, Ck + 3]"),
    tensor("block_map", BOOL, "[B, Hq, Cq + 2, Ck + 2]"),
    finite_scale,
    both_centroids_or_neither,
    tensor("k_centroids", FLOAT32, "[B, Hkv, Ck, D]"),
    tensor("v_centroids", FLOAT32, "[B, Hkv, Ck, Dv]"),
    tensor("q_order", INT32, "[B, Hq, Nq]", meaning="[B, H, N] of its tokens"),
    tensor("k_order", INT32, "[B, Hkv, Nk]", meaning="[B, H, N] of its tokens"),
    at_least_one("workspace_mb", " (MiB)"),
)

FIRST_ORDER_ATTENTION: Contract = (
    tensor("query", FLOATING, "[B, Hq, Nq, D]"),
    tensor("key", FLOATING, "[B, Hkv, Nk, D]", like="query"),
    heads_divide,
    tensor("value", FLOATING, "[B, Hkv, Nk, Dv]", like="query"),
    *offsets("q_offsets", "[B, Hq, Cq + 3]"),
    *offsets("k_offsets", "[B, Hkv, Ck + 3]"),
    tensor("block_map", BOOL, "[B, Hq, Cq + 2, Ck + 2]"),
    finite_scale,
    tensor("q_centroids", FLOAT32, "[B, Hq, Cq, D]"),
    tensor("k_centroids", FLOAT32, "[B, Hkv, Ck, D]"),
    tensor("v_centroids", FLOAT32, "[B, Hkv, Ck, Dv]"),
    tensor("log_mass", FLOAT32, "[B, Hq, Cq, Ck + 2]"),
    tensor("residual", FLOAT32, "[B, Hq, Cq, Dv]"),
    tensor("slope", FLOAT32, "[B, Hkv, D, Dv]"),
    tensor("q_order", INT32, "[B, Hq, Nq]", meaning="[B, H, N] of its tokens"),
    tensor("k_order", INT32, "[B, Hkv, Nk]", meaning="[B, H, N] of its tokens"),
    at_least_one("workspace_mb", " (MiB)"),
)

SAMPLED_ERROR: Contract = (
    tensor("query", FLOATING, "[B, Hq, Nq, D]"),
    tensor("key", FLOATING, "[B, Hkv, Nk, D]", like="query"),
    heads_divide,
    tensor("value", FLOATING, "[B, Hkv, Nk, Dv]", like="query"),
    tensor("out", FLOATING, "[B, Hq, Nq, Dv]", like="query"),
    tensor("q_order", INT32, "[B, Hq, Nq]", meaning="[B, H, N] of its tokens"),
    *offsets("q_offsets", "[B, Hq, Cq + 3]"),
    *offsets("k_offsets", "[B, Hkv, Ck + 3]"),
    finite_scale,
    at_least_one("rows"),
)

BLOCK_DENSITY: Contract = (
    tensor("block_map", BOOL, "[B, Hq, Cq + 2, Ck + 2]"),
    tensor("q_offsets", INT32, "[B, Hq, Cq + 3]"),
    tensor("k_offsets", INT32, "[B, Hkv, Ck + 3]"),
    heads_divide,
)
