"""How long a call takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

__all__ = ["median_ms"]

TIMED_RUNS = 5


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a warm call."""
    call()
    return statistics.median(_durations(call, device))


def _durations(call: Callable[[], object], device: torch.device) -> Iterator[float]:
    for _ in range(TIMED_RUNS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            yield start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            yield 1e3 * (time.perf_counter() - begin)
