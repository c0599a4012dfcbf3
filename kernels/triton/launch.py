"""What every Triton launch needs: rows with a dense last axis, the device to launch on, how many programs fill it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import triton
from torch import Tensor

from svg2_compile.kernels.dispatch import IMPLEMENTATIONS

__all__ = [
    "chunks",
    "device_of",
    "num_processors",
    "of_groups",
    "padded",
    "rehearsal",
    "require_head_dim",
    "row_strides",
    "rows_dense",
]

SCORE_BYTES = 128 << 20  # of [query clusters, key clusters] matrices at a time

# Processors of the imagined device while launches are only noted (rehearsal.py).
_imagined_processors: ContextVar[int | None] = ContextVar("svg2_imagined_processors", default=None)


@contextmanager
def rehearsal(num_processors: int) -> Iterator[None]:
    """Inside, CUDA tensors are fake: no device is made current or asked for its properties."""
    token = _imagined_processors.set(num_processors)
    try:
        yield
    finally:
        _imagined_processors.reset(token)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's CUDA device the current one: Triton launches there, whatever device the tensors are on."""
    is_real = tensor.device.type == "cuda" and _imagined_processors.get() is None
    return torch.cuda.device(tensor.device) if is_real else nullcontext()


def rows_dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense in memory (any other strides are fine), else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of [B, H, N, D], in elements."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def of_groups(tensor: Tensor, groups: slice, sharing: int = 1) -> Tensor:
    """Some (batch, query head) groups of [B, H, ...], as [groups, ...]; ``sharing`` query heads read each of H."""
    tensor = tensor if sharing == 1 else tensor.repeat_interleave(sharing, dim=1)
    return tensor.flatten(0, 1).narrow(0, groups.start, groups.stop - groups.start)


def require_head_dim(op: str, *widths: int) -> None:
    """Raise ValueError for a head that is wider than the kernels' tiles can be."""
    limit = IMPLEMENTATIONS["triton"].max_head_dim
    if limit is not None and max(widths) > limit:
        raise ValueError(
            f"svg2::{op}: head_dim is {max(widths)}; valid for the Triton kernels: at most {limit} "
            "(use_implementation('reference') takes any)"
        )


def padded(width: int) -> int:
    """The power of two that a kernel computes with for an axis of ``width``; 16 is the least that tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


@functools.cache
def _num_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a handful for the interpreter on the CPU."""
    imagined = _imagined_processors.get()
    if imagined is not None:
        return imagined
    if device.type != "cuda":
        return 4
    return _num_processors(device.index if device.index is not None else torch.cuda.current_device())


def chunks(num_groups: int, bytes_per_group: int) -> list[slice]:
    """Groups a few at a time, so that their matrices stay within SCORE_BYTES."""
    step = max(1, SCORE_BYTES // max(bytes_per_group, 1))
    return [slice(first, min(first + step, num_groups)) for first in range(0, num_groups, step)]
