"""Which tile sizes a kernel uses on this device: the user's own tuning, a shipped table, or a safe default.

``tuned`` is what kernels ask at every launch; it searches nothing and costs a dictionary lookup. Tables come from
``svg2 tune`` (``search.py``): the user's lie in the cache directory, those of measured devices in ``configs/``.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from svg2_compile.kernels.tuning.defaults import default_config
from svg2_compile.kernels.tuning.tables import Table, TuningKey, load_tables

__all__ = ["TuningKey", "device_name", "forget_tables", "measured_profile", "nearest", "override", "tuned"]

_log = logging.getLogger("svg2_compile.kernels")

_overrides: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("svg2_tuning_overrides", default={})  # noqa: B039


def device_name(device: torch.device) -> str:
    """The name that tables go by: the GPU's own, or the processor with its number of threads."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type == "cuda":
        return "no GPU"
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def tuned(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int, density: float = 0.25
) -> Mapping[str, int]:
    """The configuration of ``kernel`` for one shape on ``device``. Never searches, never fails for want of a table."""
    overridden = _overrides.get().get(kernel)
    if overridden is not None:
        return overridden
    return _lookup(TuningKey.of(kernel, dtype, head_dim, num_tokens, density), device)


@contextmanager
def override(kernel: str, config: Mapping[str, int]) -> Iterator[None]:
    """Inside the ``with`` block, ``kernel`` runs with ``config``, whatever the tables say."""
    token = _overrides.set({**_overrides.get(), kernel: config})
    try:
        yield
    finally:
        _overrides.reset(token)


def forget_tables() -> None:
    """Read the tables anew at the next launch, after ``svg2 tune`` has written one."""
    _tables.cache_clear()
    _lookup.cache_clear()


def measured_profile(device: torch.device) -> Mapping[str, float] | None:
    """What `svg2 tune` measured for the cost model on ``device``, by the names of its DeviceProfile; None before."""
    return next((table.profile for table in _tables(device_name(device)) if table.profile is not None), None)


@functools.cache
def _tables(name: str) -> tuple[Table, ...]:
    tables = load_tables(name)
    if not tables and not name.startswith("cpu"):
        _log.info("no tuned kernels for %r: safe defaults are used; `svg2 tune` measures better ones", name)
    return tables


@functools.lru_cache(maxsize=4096)
def _lookup(key: TuningKey, device: torch.device) -> Mapping[str, int]:
    default = default_config(key.kernel, device, key.dtype, key.head_dim)
    for table in _tables(device_name(device)):
        found = nearest(key, table.configs)
        # A table written for another version of the kernel may name other parameters: then it says nothing.
        if found is not None and set(found) == set(default):
            return found
    return default


def nearest(key: TuningKey, configs: Mapping[TuningKey, Mapping[str, int]]) -> Mapping[str, int] | None:
    """The configuration measured closest to ``key``: same kernel, dtype and width; tokens first, then density."""

    def distance(other: TuningKey) -> tuple[int, int]:
        return abs(other.tokens.bit_length() - key.tokens.bit_length()), abs(other.density - key.density)

    same = (key.kernel, key.dtype, key.head_dim)
    candidates = [other for other in configs if (other.kernel, other.dtype, other.head_dim) == same]
    return configs[min(candidates, key=distance)] if candidates else None
