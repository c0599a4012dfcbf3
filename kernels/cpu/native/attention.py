"""Block-sparse attention in native code, with and without first-order compensation."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.attention import check_offset_contents
from svg2_compile.kernels.cpu.native.calls import (
    VECTOR,
    Tokens,
    call_native,
    check_order,
    pointer,
    threads_for,
    tokens,
    unit_stride,
)

__all__ = ["block_sparse_attention", "first_order_attention"]

_POINTERS = (
    "lse",
    "q_offsets",
    "k_offsets",
    "block_map",
    "q_order",
    "k_order",
    "k_centroids",
    "v_centroids",
    "q_centroids",
    "log_mass",
    "residual",
    "slope",
)
_SIZES = (
    "batch",
    "q_heads",
    "kv_heads",
    "num_queries",
    "num_keys",
    "dim",
    "value_dim",
    "q_clusters",
    "k_clusters",
    "threads",
)


class AttentionCall(ctypes.Structure):
    """As ``AttentionCall`` of attention.h."""

    _fields_ = [
        *((name, Tokens) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


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
    """Softmax attention of each query block over its selected key blocks; see ``ops.block_sparse_attention``. Its
    workspace is less than a MiB per thread at head_dim 128, whatever ``workspace_mb`` is."""
    blocks = {"q_offsets": q_offsets, "k_offsets": k_offsets, "block_map": block_map}
    orders = {"q_order": q_order, "k_order": k_order}
    return _attention(query, key, value, scale, **blocks, **orders, k_centroids=k_centroids, v_centroids=v_centroids)


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
    return _attention(
        query,
        key,
        value,
        scale,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
        block_map=block_map,
        q_order=q_order,
        k_order=k_order,
        k_centroids=k_centroids,
        v_centroids=v_centroids,
        q_centroids=q_centroids,
        log_mass=log_mass,
        residual=residual,
        slope=slope,
    )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, **others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """others: the tensors of ``AttentionCall`` but lse, by name; what is left out is null."""
    batch, q_heads, num_queries, dim = query.shape
    kv_heads, num_keys, value_dim = value.shape[1:]
    given = {name: None if x is None else x.contiguous() for name, x in others.items()}
    q_offsets, k_offsets = given["q_offsets"], given["k_offsets"]
    assert q_offsets is not None and k_offsets is not None
    check_offset_contents("q_offsets", q_offsets, num_queries)
    check_offset_contents("k_offsets", k_offsets, num_keys)
    for order in (given.get("q_order"), given.get("k_order")):
        if order is not None:
            check_order(order)
    if given.get("q_order") is None:
        out = query.new_empty(batch, q_heads, num_queries, value_dim)
    else:
        out = query.new_empty(batch, num_queries, q_heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, q_heads, num_queries)
    if lse.numel() == 0 or value_dim == 0:
        return out, lse.fill_(-math.inf)
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    pairs = batch * q_heads * num_queries * num_keys  # at the most
    sizes = (batch, q_heads, kv_heads, num_queries, num_keys, dim, value_dim)
    clusters = (q_offsets.shape[2] - 3, k_offsets.shape[2] - 3)
    counts = zip(_SIZES, (*sizes, *clusters, threads_for(pairs * (dim + value_dim) / VECTOR)), strict=True)
    pointers = {name: pointer(x) for name, x in given.items()}
    four = map(tokens, (query, key, value, out))
    call = AttentionCall(*four, scale=scale, lse=pointer(lse), **pointers, **dict(counts))
    call_native("attention", call)
    return out, lse
