"""Estimates of blocks and the terms of first-order compensation in native code."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.attention import check_offset_contents
from svg2_compile.kernels.cpu.native.attention import block_sparse_attention
from svg2_compile.kernels.cpu.native.calls import VECTOR, Tokens, call_native, pointer, threads_for, tokens, unit_stride

__all__ = ["block_estimates", "first_order_estimates", "first_order_terms"]

# Parts of the clusters of a head, summed on their own: fixed, so that no sum depends on the number of threads.
PARTS_OF_TERMS = 8
CLUSTERS_PER_PART_OF_ESTIMATES = 64

_POINTERS = (
    "k_offsets",
    "q_centroids",
    "k_centroids",
    "v_centroids",
    "outputs",
    "mass",
    "error",
    "log_mass",
    "block_map",
    "residual_of_all",
    "residual",
    "residual_sums",
    "slope_sums",
    "slope",
)
_SIZES = ("batch", "q_heads", "kv_heads", "dim", "value_dim", "q_clusters", "k_clusters", "parts", "threads")


class ClustersCall(ctypes.Structure):
    """As ``ClustersCall`` of clusters.h."""

    _fields_ = [
        ("key", Tokens),
        ("value", Tokens),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


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
    return _estimates(key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale, None)


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
    residual = q_centroids.new_zeros(*q_centroids.shape[:3], v_centroids.shape[3])
    clustered = (key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale)
    return *_estimates(*clustered, residual if residual.numel() > 0 else None), residual


def _estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masses and errors; the residual of all clusters into ``residual`` [B, Hq, Cq, Dv]."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    num_k_clusters = k_centroids.shape[2]
    mass = q_centroids.new_empty(batch, q_heads, num_q_clusters, num_k_clusters + 2)
    mass[..., num_k_clusters:] = -torch.inf
    error = q_centroids.new_empty(batch, q_heads, num_q_clusters, num_k_clusters)
    if error.numel() == 0:
        return mass, error
    # Both as attention of the query centroids, all of them one block: to the means of all clusters, and to the context.
    q_offsets = k_offsets.new_tensor([0, *[num_q_clusters] * 3]).repeat(batch, q_heads, 1)
    selected = torch.zeros(batch, q_heads, 3, num_k_clusters + 2, dtype=torch.bool)
    args = (q_centroids, key, value, q_offsets, k_offsets)
    outputs, _ = block_sparse_attention(*args, selected, scale, k_centroids, v_centroids)
    if bool((k_offsets[..., num_k_clusters] < k_offsets[..., num_k_clusters + 1]).any()):
        selected[..., num_k_clusters] = True
        mass[..., num_k_clusters] = block_sparse_attention(*args, selected, scale)[1]
    given = {"q_centroids": q_centroids, "k_centroids": k_centroids, "v_centroids": v_centroids, "outputs": outputs}
    parts = -(-num_k_clusters // CLUSTERS_PER_PART_OF_ESTIMATES)
    results = {"mass": mass, "error": error}
    if residual is not None:
        row = residual.shape[3] + 2
        results |= {
            "residual": residual,
            "residual_sums": residual.new_empty(parts, batch * q_heads * num_q_clusters * row),
        }
    _call("estimates", key, value, scale, parts, k_offsets=k_offsets, **results, **given)
    return mass, error


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
    """Residual of every query cluster and slope of every key head; see ``ops.first_order_terms``."""
    batch, kv_heads, _, head_dim = k_centroids.shape
    num_queries = q_centroids.shape[1] // max(kv_heads, 1) * q_centroids.shape[2]
    value_dim = v_centroids.shape[3]
    residual = q_centroids.new_empty(*q_centroids.shape[:3], value_dim)
    slope = q_centroids.new_empty(batch, kv_heads, head_dim, value_dim)
    if residual.numel() == 0 or slope.numel() == 0:
        return residual.zero_(), slope.zero_()
    given = {"q_centroids": q_centroids, "k_centroids": k_centroids, "v_centroids": v_centroids}
    of_parts = (batch, kv_heads, PARTS_OF_TERMS)
    residual_sums = q_centroids.new_empty(*of_parts, num_queries, value_dim)
    slope_sums = q_centroids.new_empty(*of_parts, head_dim, value_dim)
    results = {"residual": residual, "residual_sums": residual_sums, "slope_sums": slope_sums, "slope": slope}
    known = {"k_offsets": k_offsets, "log_mass": log_mass, "block_map": block_map}
    if residual_of_all is not None:
        known["residual_of_all"] = residual_of_all
    _call("terms", key, value, scale, PARTS_OF_TERMS, **known, **given, **results)
    return residual, slope


def _call(name: str, key: Tensor, value: Tensor, scale: float, parts: int, **others: Tensor) -> None:
    """others: the tensors of ``ClustersCall`` by name; what is left out is null."""
    check_offset_contents("k_offsets", others["k_offsets"], key.shape[2])
    given = {argument: x.contiguous() for argument, x in others.items()}
    key, value = unit_stride(key), unit_stride(value)
    pointers = {argument: pointer(x) for argument, x in given.items()}
    batch, q_heads, num_q_clusters, head_dim = given["q_centroids"].shape
    kv_heads, num_k_clusters, value_dim = given["v_centroids"].shape[1:]
    sizes = (batch, q_heads, kv_heads, head_dim, value_dim, num_q_clusters, num_k_clusters, parts)
    operations = q_heads * batch * num_q_clusters * key.shape[2] * (head_dim + value_dim) / VECTOR
    counts = dict(zip(_SIZES, (*sizes, threads_for(operations)), strict=True))
    call = ClustersCall(tokens(key), tokens(value), scale=scale, **pointers, **counts)
    call_native(name, call)
