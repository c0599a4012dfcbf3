"""Contracts of the ops: shapes, dtypes, devices and ranges, with messages that say what was given and what is valid.

Every check reads metadata only (never tensor contents), so it costs microseconds and never synchronises with a
device. A wrong dtype is a ``TypeError``; a wrong shape, device or range is a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_EXTRA_BLOCKS = 2  # after the clusters: the context block, then the null block


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless ``tensor.dtype`` is one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        given = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"svg2::{op}: {name} has dtype {given}; valid: {_dtype_names(dtypes)}")


def require_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has the expected sizes (None = any size); ``meaning`` spells the shape
    out."""
    sizes_match = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not sizes_match:
        numbers = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"svg2::{op}: {name} has shape {_shape(tensor)}; valid: {meaning} = [{numbers}]")


def require_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on the device of the first one."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"svg2::{op}: all tensors must be on one device; given: {listing}")


def require_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high (NaN is never valid)."""
    if not low <= value <= high:
        raise ValueError(f"svg2::{op}: {name} is {value}; valid: a number in [{low}, {high}]")


def require_scale(op: str, scale: float) -> None:
    """Raise ValueError unless the softmax scale is finite."""
    if not math.isfinite(scale):
        raise ValueError(f"svg2::{op}: scale is {scale}; valid: a finite number, usually head_dim ** -0.5")


def require_heads(op: str, num_q_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless the query heads divide evenly among the key/value heads."""
    if num_kv_heads == 0 and num_q_heads == 0:
        return
    if num_kv_heads == 0 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"svg2::{op}: query has {num_q_heads} heads and key has {num_kv_heads}; "
            "valid: a number of query heads that is a multiple of the number of key heads"
        )


def _require_valid_mask(op: str, valid: Tensor | None, batch: int, heads: int, num_tokens: int) -> None:
    if valid is None:
        return
    require_dtype(op, "valid", valid, (torch.bool,))
    mask_heads = valid.shape[1] if valid.dim() == 3 and valid.shape[1] in (1, heads) else heads
    require_shape(op, "valid", valid, (batch, mask_heads, num_tokens), "[B, 1 or H, N]")


def check_kmeans(x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None) -> None:
    """Contract of ``svg2::kmeans``."""
    op = "kmeans"
    require_dtype(op, "x", x, FLOATING_DTYPES)
    require_shape(op, "x", x, (None, None, None, None), "[B, H, N, D]")
    batch, heads, num_tokens, head_dim = x.shape
    require_dtype(op, "centroids", centroids, (torch.float32,))
    require_shape(op, "centroids", centroids, (batch, heads, None, head_dim), "[B, H, C, D]")
    num_clusters = centroids.shape[2]
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(
            f"svg2::{op}: centroids has {num_clusters} clusters for {num_tokens} tokens; "
            f"valid: 1 to {num_tokens} clusters (no more than tokens)"
        )
    require_dtype(op, "seeded", seeded, (torch.bool,))
    require_shape(op, "seeded", seeded, (), "a scalar tensor []")
    if iters < 1:
        raise ValueError(f"svg2::{op}: iters is {iters}; valid: an integer of at least 1")
    _require_valid_mask(op, valid, batch, heads, num_tokens)
    require_same_device(op, x=x, centroids=centroids, seeded=seeded, valid=valid)


def check_cluster_order(labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None) -> None:
    """Contract of ``svg2::cluster_order``."""
    op = "cluster_order"
    require_dtype(op, "labels", labels, (torch.int32,))
    require_shape(op, "labels", labels, (None, None, None), "[B, H, video tokens]")
    if num_clusters < 1:
        raise ValueError(f"svg2::{op}: num_clusters is {num_clusters}; valid: an integer of at least 1")
    batch, heads, video_tokens = labels.shape
    if start < 0 or start + video_tokens > num_tokens:
        raise ValueError(
            f"svg2::{op}: start is {start} with {video_tokens} video tokens in num_tokens = {num_tokens}; "
            f"valid: 0 <= start and start + {video_tokens} <= num_tokens"
        )
    _require_valid_mask(op, valid, batch, heads, num_tokens)
    require_same_device(op, labels=labels, valid=valid)


def _check_selection_limits(op: str, scale: float, top_p: float, min_k_ratio: float, density: float | None) -> None:
    require_scale(op, scale)
    require_range(op, "top_p", top_p, 0.0, float("inf"))  # 1 and above: every cluster
    require_range(op, "min_k_ratio", min_k_ratio, 0.0, 1.0)
    if density is not None:
        require_range(op, "density", density, 0.0, 1.0)


def _check_centroid_pair(op: str, q_centroids: Tensor, k_centroids: Tensor) -> None:
    require_dtype(op, "q_centroids", q_centroids, (torch.float32,))
    require_dtype(op, "k_centroids", k_centroids, (torch.float32,))
    require_shape(op, "q_centroids", q_centroids, (None, None, None, None), "[B, Hq, Cq, D]")
    batch, q_heads, num_q_clusters, head_dim = q_centroids.shape
    require_shape(op, "k_centroids", k_centroids, (batch, None, None, head_dim), "[B, Hkv, Ck, D]")
    if num_q_clusters < 1 or k_centroids.shape[2] < 1:
        raise ValueError(
            f"svg2::{op}: q_centroids has {num_q_clusters} clusters and k_centroids {k_centroids.shape[2]}; "
            "valid: at least 1 of each"
        )
    require_heads(op, q_heads, k_centroids.shape[1])


def check_select_blocks(
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    scale: float,
    top_p: float,
    min_k_ratio: float,
    density: float | None,
) -> None:
    """Contract of ``svg2::select_blocks``."""
    op = "select_blocks"
    _check_centroid_pair(op, q_centroids, k_centroids)
    for name, sizes, centroids in (("q_sizes", q_sizes, q_centroids), ("k_sizes", k_sizes, k_centroids)):
        require_dtype(op, name, sizes, (torch.int32,))
        require_shape(op, name, sizes, tuple(centroids.shape[:3]), "[B, H, clusters] of its centroids")
    _check_selection_limits(op, scale, top_p, min_k_ratio, density)
    require_same_device(op, q_centroids=q_centroids, k_centroids=k_centroids, q_sizes=q_sizes, k_sizes=k_sizes)


def check_tokens_and_order(op: str, x: Tensor, order: Tensor) -> None:
    """Contract of ``svg2::permute_tokens`` and ``svg2::unpermute_tokens``."""
    require_dtype(op, "x", x, FLOATING_DTYPES)
    require_shape(op, "x", x, (None, None, None, None), "[B, H, N, D]")
    require_dtype(op, "order", order, (torch.int32,))
    require_shape(op, "order", order, tuple(x.shape[:3]), "[B, H, N]")
    require_same_device(op, x=x, order=order)


def _check_offsets(op: str, name: str, offsets: Tensor, batch: int, heads: int) -> None:
    require_dtype(op, name, offsets, (torch.int32,))
    require_shape(op, name, offsets, (batch, heads, None), "[B, H, clusters + 3]")
    smallest = 1 + NUM_EXTRA_BLOCKS + 1  # one cluster, context, null: four boundaries
    if offsets.shape[2] < smallest:
        raise ValueError(
            f"svg2::{op}: {name} has {offsets.shape[2]} boundaries; valid: at least {smallest} (clusters + 3)"
        )


def check_cluster_means(x: Tensor, offsets: Tensor) -> None:
    """Contract of ``svg2::cluster_means``."""
    op = "cluster_means"
    require_dtype(op, "x", x, FLOATING_DTYPES)
    require_shape(op, "x", x, (None, None, None, None), "[B, H, N, D]")
    _check_offsets(op, "offsets", offsets, x.shape[0], x.shape[1])
    require_same_device(op, x=x, offsets=offsets)


def check_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    k_centroids: Tensor | None,
    v_centroids: Tensor | None,
    q_order: Tensor | None,
    k_order: Tensor | None,
    workspace_mb: int,
) -> None:
    """Contract of ``svg2::block_sparse_attention``."""
    op = "block_sparse_attention"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(op, name, tensor, FLOATING_DTYPES)
        require_dtype(op, name, tensor, (query.dtype,))
    require_shape(op, "query", query, (None, None, None, None), "[B, Hq, Nq, D]")
    batch, q_heads, _, head_dim = query.shape
    require_shape(op, "key", key, (batch, None, None, head_dim), "[B, Hkv, Nk, D]")
    kv_heads, num_keys = key.shape[1], key.shape[2]
    require_heads(op, q_heads, kv_heads)
    require_shape(op, "value", value, (batch, kv_heads, num_keys, None), "[B, Hkv, Nk, Dv]")
    _check_offsets(op, "q_offsets", q_offsets, batch, q_heads)
    _check_offsets(op, "k_offsets", k_offsets, batch, kv_heads)
    require_dtype(op, "block_map", block_map, (torch.bool,))
    num_q_blocks, num_k_blocks = q_offsets.shape[2] - 1, k_offsets.shape[2] - 1
    require_shape(op, "block_map", block_map, (batch, q_heads, num_q_blocks, num_k_blocks), "[B, Hq, Cq + 2, Ck + 2]")
    require_scale(op, scale)
    if (k_centroids is None) != (v_centroids is None):
        missing = "k_centroids" if k_centroids is None else "v_centroids"
        raise ValueError(f"svg2::{op}: {missing} is None; valid: both centroids (compensation) or neither")
    if k_centroids is not None and v_centroids is not None:
        num_clusters = num_k_blocks - NUM_EXTRA_BLOCKS
        require_dtype(op, "k_centroids", k_centroids, (torch.float32,))
        require_dtype(op, "v_centroids", v_centroids, (torch.float32,))
        require_shape(op, "k_centroids", k_centroids, (batch, kv_heads, num_clusters, head_dim), "[B, Hkv, Ck, D]")
        dims = (batch, kv_heads, num_clusters, value.shape[3])
        require_shape(op, "v_centroids", v_centroids, dims, "[B, Hkv, Ck, Dv]")
    _check_order(op, "q_order", q_order, query)
    _check_order(op, "k_order", k_order, key)
    if workspace_mb < 1:
        raise ValueError(f"svg2::{op}: workspace_mb is {workspace_mb}; valid: an integer of at least 1 (MiB)")
    require_same_device(
        op,
        query=query,
        key=key,
        value=value,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
        block_map=block_map,
        k_centroids=k_centroids,
        v_centroids=v_centroids,
        q_order=q_order,
        k_order=k_order,
    )


def _check_order(op: str, name: str, order: Tensor | None, tokens: Tensor) -> None:
    if order is not None:
        require_dtype(op, name, order, (torch.int32,))
        require_shape(op, name, order, tuple(tokens.shape[:3]), "[B, H, N] of its tokens")


def check_select_blocks_by_error(
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
    density: float | None,
) -> None:
    """Contract of ``svg2::select_blocks_by_error``."""
    op = "select_blocks_by_error"
    _check_centroid_pair(op, q_centroids, k_centroids)
    batch, kv_heads, num_clusters, head_dim = k_centroids.shape
    require_dtype(op, "key", key, FLOATING_DTYPES)
    require_dtype(op, "value", value, FLOATING_DTYPES)
    require_shape(op, "key", key, (batch, kv_heads, None, head_dim), "[B, Hkv, Nk, D]")
    require_shape(op, "value", value, (batch, kv_heads, key.shape[2], None), "[B, Hkv, Nk, Dv]")
    require_dtype(op, "k_offsets", k_offsets, (torch.int32,))
    require_shape(op, "k_offsets", k_offsets, (batch, kv_heads, num_clusters + 3), "[B, Hkv, Ck + 3]")
    require_dtype(op, "v_centroids", v_centroids, (torch.float32,))
    dims = (batch, kv_heads, num_clusters, value.shape[3])
    require_shape(op, "v_centroids", v_centroids, dims, "[B, Hkv, Ck, Dv]")
    require_dtype(op, "q_sizes", q_sizes, (torch.int32,))
    require_shape(op, "q_sizes", q_sizes, tuple(q_centroids.shape[:3]), "[B, Hq, Cq]")
    _check_selection_limits(op, scale, top_p, min_k_ratio, density)
    require_same_device(
        op,
        key=key,
        value=value,
        k_offsets=k_offsets,
        q_centroids=q_centroids,
        k_centroids=k_centroids,
        v_centroids=v_centroids,
        q_sizes=q_sizes,
    )


def check_block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> None:
    """Contract of ``svg2::block_density``."""
    op = "block_density"
    require_dtype(op, "block_map", block_map, (torch.bool,))
    require_shape(op, "block_map", block_map, (None, None, None, None), "[B, Hq, Cq + 2, Ck + 2]")
    batch, q_heads, num_q_blocks, num_k_blocks = block_map.shape
    require_dtype(op, "q_offsets", q_offsets, (torch.int32,))
    require_dtype(op, "k_offsets", k_offsets, (torch.int32,))
    require_shape(op, "q_offsets", q_offsets, (batch, q_heads, num_q_blocks + 1), "[B, Hq, Cq + 3]")
    require_shape(op, "k_offsets", k_offsets, (batch, None, num_k_blocks + 1), "[B, Hkv, Ck + 3]")
    require_heads(op, q_heads, k_offsets.shape[1])
    require_same_device(op, q_offsets=q_offsets, k_offsets=k_offsets, block_map=block_map)
