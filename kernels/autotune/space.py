"""What can be tuned, as data: for every kernel the values that its parameters may take.

Combinations that cannot work (too much shared memory, spills in the inner loop) are not listed here: the resource model
sorts them out before anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

__all__ = ["CPU_KERNELS", "GPU_KERNELS", "SPACES", "candidates"]

Space = Mapping[str, tuple[int, ...]]

SPACES: Mapping[str, Space] = {
    "attention": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "PROGRAMS_PER_SM": (1, 2),
    },
    "kmeans_assign": {
        "BLOCK_N": (64, 128, 256),
        "BLOCK_C": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "cpu_kmeans": {"SCORES_PER_TILE": (1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)},
    "cpu_attention": {"MIN_KEYS_PER_PART": (64, 128, 256, 512), "MIN_IDLE_PAIRS": (1 << 14, 1 << 16, 1 << 18)},
    "cpu_error": {"ERRORS_PER_TILE": (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)},
}
CPU_KERNELS = tuple(name for name in SPACES if name.startswith("cpu_"))
GPU_KERNELS = tuple(name for name in SPACES if not name.startswith("cpu_"))


def candidates(kernel: str) -> list[dict[str, int]]:
    """Every combination of a kernel's space, in a fixed order. Raises ValueError for an unknown kernel."""
    if kernel not in SPACES:
        raise ValueError(f"candidates: kernel is {kernel!r}; valid: {', '.join(SPACES)}")
    space = SPACES[kernel]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
