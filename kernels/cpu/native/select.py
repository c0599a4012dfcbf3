"""Selection by error in native code: with one budget for all heads, or for each row."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.native.calls import VECTOR, call_native, pointer, threads_for
from svg2_compile.kernels.cpu.native.clusters import block_estimates
from svg2_compile.kernels.cpu.select import add_context_and_null, select_by_error

__all__ = ["select_blocks_by_error", "select_blocks_of_layer"]

_POINTERS = (
    "log_mass",
    "log_error",
    "q_variances",
    "k_centroids",
    "q_sizes",
    "k_offsets",
    "far_members",
    "block_map",
    "priority",
)
_SIZES = ("batch", "q_heads", "kv_heads", "dim", "q_clusters", "k_clusters", "members", "threads")


class SelectCall(ctypes.Structure):
    """As ``SelectCall`` of select.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_double),
        ("density", ctypes.c_double),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


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
    """The blocks of most error per pair over all heads of a batch item; see ``ops.select_blocks_of_layer``."""
    if float(density) >= 1:
        return add_context_and_null(torch.ones_like(log_error, dtype=torch.bool))
    batch, q_heads, q_clusters, k_clusters = log_error.shape
    kv_heads, _, dim = k_centroids.shape[1:]
    block_map = log_error.new_empty(batch, q_heads, q_clusters + 2, k_clusters + 2, dtype=torch.bool)
    block_map[..., -1, :] = False
    block_map[..., -2, :] = True
    block_map[..., -2] = True
    block_map[..., -1] = False
    given = (log_mass, log_error, q_variances, k_centroids, q_sizes, k_offsets, far_members, block_map)
    workspace = torch.empty_like(log_error, memory_format=torch.contiguous_format)
    kept_alive = [None if x is None else x.contiguous() for x in (*given, workspace)]
    members = 0 if far_members is None else far_members.shape[3]
    threads = threads_for(log_error.numel() * (1 + members) * (dim / VECTOR + 20))
    sizes = zip(_SIZES, (batch, q_heads, kv_heads, dim, q_clusters, k_clusters, members, threads), strict=True)
    call = SelectCall(*map(pointer, kept_alive), scale, float(density), **dict(sizes))
    if log_error.numel() > 0:
        call_native("select", call)
    return block_map


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
    clustered = (key, value, k_offsets, q_centroids, k_centroids, v_centroids)
    return select_by_error(lambda *given: block_estimates(*given)[1], *clustered, scale, top_p, min_k_ratio, density)
