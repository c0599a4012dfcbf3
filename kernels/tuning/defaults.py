"""Tile sizes for devices that nobody has tuned. Safe before fast: they fit into the smallest memory of their kind.

The GPU entries fit into shared memory wherever they are used and hold no spills in their inner loops; the tests compile
each of them for sm_80, sm_90 and sm_100, and some for gfx942. They were chosen by instruction count, not by time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["capability_of", "default_config", "imagined_capability"]

_CPU: Mapping[str, Mapping[str, int]] = {
    # 2 MiB of scores: small enough that the arg-max finds in cache what the product has just left there.
    "cpu_kmeans": {"SCORES_PER_TILE": 1 << 19},
    # Fewer keys per part, or fewer pairs than idle threads could compute, cost more to merge than an idle core.
    "cpu_attention": {"MIN_KEYS_PER_PART": 128, "MIN_IDLE_PAIRS": 1 << 16},
    "cpu_error": {"ERRORS_PER_TILE": 1 << 18},
}
_INTERPRETER: Mapping[str, Mapping[str, int]] = {
    "attention": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "PROGRAMS_PER_SM": 1},
    "kmeans_assign": {"BLOCK_N": 64, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2},
}
# Compute capability of the device that launches are rehearsed for; None where launches are real.
_imagined: ContextVar[int | None] = ContextVar("svg2_imagined_capability", default=None)


@contextmanager
def imagined_capability(capability: int) -> Iterator[None]:
    """Inside, CUDA devices count as one of ``capability`` (90 for sm_90), which need not be there."""
    token = _imagined.set(capability)
    try:
        yield
    finally:
        _imagined.reset(token)


def capability_of(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 0 for AMD's, and for the CPU, where kernels are interpreted."""
    imagined = _imagined.get()
    if imagined is not None:
        return imagined
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def default_config(kernel: str, device: torch.device, dtype: str, head_dim: int) -> Mapping[str, int]:
    """Safe parameters of ``kernel``. dtype without "torch."; head_dim as padded. Raises KeyError for no such kernel."""
    if kernel in _CPU:
        return _CPU[kernel]
    if device.type == "cpu" and _imagined.get() is None:
        return _INTERPRETER[kernel]
    choose = {"attention": _attention, "kmeans_assign": _kmeans_assign}[kernel]
    return choose(capability_of(device), dtype == "float32", head_dim)


def _attention(capability: int, exact: bool, width: int) -> Mapping[str, int]:
    """exact: float32, multiplied outside the tensor cores, where tiles take many more registers."""
    roomy = capability // 10 in (9, 10)  # 227 KiB of shared memory; sm_80 has 163, sm_86, sm_89 and sm_120 have 99
    if exact:
        return _tiles(64, 32, 8, 2) if width <= 64 else _tiles(32, 32, 8, 2) if width <= 128 else _tiles(32, 16, 8, 2)
    if capability == 0:  # AMD: 64 KiB of local memory
        return _tiles(64, 32, 4, 2) if width > 128 else _tiles(128, 64, 8, 2)
    if width > 128:
        return _tiles(64, 32, 8, 2) if roomy else _tiles(32, 32, 4, 2)
    return _tiles(128, 128, 8, 2) if roomy else _tiles(128, 64, 8, 3)


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Mapping[str, int]:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    return {**sizes, "PROGRAMS_PER_SM": 1}


def _kmeans_assign(capability: int, exact: bool, width: int) -> Mapping[str, int]:
    if exact or width > 128:
        return {"BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 8 if exact else 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
