"""Order, permutation, means, variances and farthest members in native code."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.attention import check_offset_contents
from svg2_compile.kernels.cpu.cluster import check_labels
from svg2_compile.kernels.cpu.native.calls import (
    Tokens,
    call_native,
    check_order,
    pointer,
    threads_for,
    tokens,
    unit_stride,
)

__all__ = [
    "cluster_means",
    "cluster_order",
    "cluster_variances",
    "farthest_members",
    "permute_tokens",
    "unpermute_tokens",
]

_SIZES = (
    "batch",
    "heads",
    "num_tokens",
    "dim",
    "clusters",
    "start",
    "video_tokens",
    "valid_heads",
    "inverse",
    "count",
    "threads",
)


class TokensCall(ctypes.Structure):
    """As ``TokensCall`` of tokens.cpp."""

    _fields_ = [
        ("x", Tokens),
        ("out", Tokens),
        *((name, ctypes.c_void_p) for name in ("order", "offsets", "labels", "valid", "centroids", "means")),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


def cluster_order(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stable counting sort of tokens by block; see ``ops.cluster_order``."""
    check_labels(labels, num_clusters)
    batch, heads, video_tokens = labels.shape
    labels, valid = labels.contiguous(), None if valid is None else valid.contiguous()
    order = labels.new_empty(batch, heads, num_tokens)
    offsets = labels.new_empty(batch, heads, num_clusters + 3)
    given = {"order": order, "offsets": offsets, "labels": labels, "valid": valid}
    sizes = {"clusters": num_clusters, "start": start, "video_tokens": video_tokens}
    sizes |= {"valid_heads": 1 if valid is None else valid.shape[1]}
    _call("order", given, {"batch": batch, "heads": heads, "num_tokens": num_tokens, **sizes})
    return order, offsets


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Row r of the result is token order[r]; see ``ops.permute_tokens``."""
    return _permuted(x, order, x.new_empty(x.shape), inverse=False)


def unpermute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token order[r] of the result is row r, laid out token by token; see ``ops.unpermute_tokens``."""
    batch, heads, num_tokens, head_dim = x.shape
    return _permuted(x, order, x.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2), inverse=True)


def cluster_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of the rows of each cluster; see ``ops.cluster_means``."""
    return _of_clusters("means", x, offsets, {})


def cluster_variances(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor) -> Tensor:
    """Mean square of the members' distance to their centroid, per dimension; see ``ops.cluster_variances``."""
    check_order(order)
    return _of_clusters("means", x, offsets, {"order": order.contiguous(), "centroids": centroids.contiguous()})


def farthest_members(x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, count: int) -> Tensor:
    """What the members farthest from their centroid differ by; see ``ops.farthest_members``."""
    check_order(order)
    given = {"order": order.contiguous(), "centroids": centroids.contiguous()}
    return _of_clusters("farthest", x, offsets, given, count)


def _permuted(x: Tensor, order: Tensor, out: Tensor, inverse: bool) -> Tensor:
    check_order(order)
    x, order = unit_stride(x), order.contiguous()
    batch, heads, num_tokens, dim = x.shape
    sizes = {"batch": batch, "heads": heads, "num_tokens": num_tokens, "dim": dim, "inverse": int(inverse)}
    _call("permute", {"order": order}, sizes, tokens(x), tokens(out))
    return out


def _of_clusters(name: str, x: Tensor, offsets: Tensor, given: dict[str, Tensor], count: int | None = None) -> Tensor:
    """What the native op ``name`` makes of each cluster: one row, or ``count`` of them."""
    check_offset_contents("offsets", offsets, x.shape[2])
    x, offsets = unit_stride(x), offsets.contiguous()
    batch, heads, num_tokens, dim = x.shape
    num_clusters = offsets.shape[2] - 3
    rows = (num_clusters,) if count is None else (num_clusters, count)
    result = x.new_empty(batch, heads, *rows, dim, dtype=torch.float32)
    sizes = {"batch": batch, "heads": heads, "num_tokens": num_tokens, "dim": dim, "clusters": num_clusters}
    _call(name, {**given, "offsets": offsets, "means": result}, {**sizes, "count": count or 1}, tokens(x))
    return result


def _call(
    name: str,
    given: dict[str, Tensor] | dict[str, Tensor | None],
    sizes: dict[str, int],
    x: Tokens | None = None,
    out: Tokens | None = None,
) -> None:
    pointers = {argument: pointer(tensor) for argument, tensor in given.items()}
    operations = sizes["batch"] * sizes["heads"] * sizes["num_tokens"] * max(8, sizes.get("dim", 0) // 4)
    call = TokensCall(x or Tokens(), out or Tokens(), **pointers, **sizes, threads=threads_for(operations))
    call_native(name, call)
