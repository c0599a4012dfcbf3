"""How Python calls the native library: tensors as pointers and strides, each call as one C structure."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.native.build import native

__all__ = ["VECTOR", "Tokens", "call_native", "check_order", "pointer", "threads_for", "tokens", "unit_stride"]

OPERATIONS_PER_THREAD = 1 << 18  # some tenths of a millisecond
VECTOR = 8  # numbers in a vector, about
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tokens(ctypes.Structure):
    """A tensor [B, H, N, D]; as ``Tokens`` of rows.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("type", ctypes.c_int64),
    ]


def tokens(x: Tensor) -> Tokens:
    """Of x [B, H, N, D] with unit stride in D; the caller keeps x alive."""
    assert x.shape[3] <= 1 or x.stride(3) == 1
    return Tokens(x.data_ptr(), *x.stride()[:3], TYPES[x.dtype])


def unit_stride(x: Tensor) -> Tensor:
    """x [B, H, N, D], copied if its rows are not contiguous."""
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def threads_for(operations: float) -> int:
    """How many threads a call is worth that takes so many vector operations or moves of numbers.

    On a machine that is not idle, waking another one and waiting for it may take longer than a small op takes alone.
    """
    return min(torch.get_num_threads(), max(1, int(operations / OPERATIONS_PER_THREAD)))


def pointer(x: Tensor | None) -> int | None:
    """Of a contiguous tensor; null for None. The caller keeps it alive."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()


def check_order(order: Tensor) -> None:
    """An order indexes memory: a wrong one must be an error here, not a crash there."""
    num_tokens = order.shape[2]
    if order.numel() == 0:
        return
    order = order.contiguous()
    library, found = native().library, (ctypes.c_int32 * 2)()
    assert library is not None, "who calls has looked"
    library.svg2_range(ctypes.c_void_p(order.data_ptr()), ctypes.c_int64(order.numel()), found)
    if found[0] < 0 or found[1] >= num_tokens:
        raise ValueError(f"svg2: order lies in [{found[0]}, {found[1]}]; valid: [0, {num_tokens})")


def call_native(name: str, call: ctypes.Structure) -> None:
    """Run the native op ``svg2_<name>``, without the GIL. Raises MemoryError where its workspace is not to be had."""
    library = native().library
    assert library is not None, "who calls has looked"
    size: Any = getattr(library, f"svg2_{name}_call_bytes")
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(call), f"{type(call).__name__} is not what the native code reads"
    function: Any = getattr(library, f"svg2_{name}")
    function.restype = ctypes.c_int64
    if function(ctypes.byref(call)) != 0:
        raise MemoryError(f"svg2::{name}: no memory for the workspace of the native code")
