"""k-means in native code."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.native.calls import VECTOR, Tokens, call_native, pointer, threads_for, tokens, unit_stride

__all__ = ["kmeans"]

_SIZES = ("batch", "heads", "num_tokens", "dim", "clusters", "iters", "valid_heads", "threads")


class KmeansCall(ctypes.Structure):
    """As ``KmeansCall`` of kmeans.cpp."""

    _fields_ = [
        ("x", Tokens),
        *((name, ctypes.c_void_p) for name in ("start", "valid", "labels", "centroids", "sizes")),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


def kmeans(
    x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm; see ``ops.kmeans``."""
    batch, heads, num_tokens, dim = x.shape
    clusters = centroids.shape[2]
    x, start = unit_stride(x), centroids.contiguous() if bool(seeded) else None
    valid = None if valid is None else valid.contiguous()
    labels = x.new_empty(batch, heads, num_tokens, dtype=torch.int32)
    means = x.new_empty(batch, heads, clusters, dim, dtype=torch.float32)
    sizes = x.new_zeros(batch, heads, clusters, dtype=torch.int32)
    given = zip(("start", "valid", "labels", "centroids", "sizes"), (start, valid, labels, means, sizes), strict=True)
    valid_heads = 1 if valid is None else valid.shape[1]
    threads = threads_for(batch * heads * num_tokens * clusters * dim * iters / VECTOR)
    counts = zip(_SIZES, (batch, heads, num_tokens, dim, clusters, iters, valid_heads, threads), strict=True)
    call = KmeansCall(tokens(x), **{name: pointer(tensor) for name, tensor in given}, **dict(counts))
    if iters == 0:
        labels.zero_()
    if labels.numel() > 0:
        call_native("kmeans", call)
    return labels, means, sizes
