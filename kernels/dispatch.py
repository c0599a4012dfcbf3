"""Which implementation of the ops runs: one table by device, and explicit requests that never fall back."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Implementation(NamedTuple):
    """One implementation of all ops: a module with a function per op, the device types that it serves, and the widest
    head_dim that it takes (None: any)."""

    module: str
    devices: tuple[str, ...]
    max_head_dim: int | None = None


# Triton's interpreter runs the GPU kernels on CPU tensors, for tests; it decides by this variable, at import.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None

IMPLEMENTATIONS = {
    "reference": Implementation("svg2_compile.kernels.reference.implementation", ("cpu", "cuda")),
    "cpu": Implementation("svg2_compile.kernels.cpu.implementation", ("cpu",)),
    "native": Implementation("svg2_compile.kernels.cpu.native.implementation", ("cpu",)),
    "triton": Implementation(
        "svg2_compile.kernels.triton.implementation",
        ("cpu", "cuda") if _INTERPRETED else ("cuda",),
        max_head_dim=256,  # a tile of a wider head does not fit into registers
    ),
}

# What runs when nobody asks for anything, by device type. A device without an entry is an error, not a fallback.
# "native" is "cpu" where there is no compiler, which is said once.
# A CUDA build of torch brings Triton along on Linux; where there is none the readable reference runs, and the cost
# model knows it.
DEFAULT_IMPLEMENTATION = {
    "cpu": "native",
    "cuda": "triton" if _HAS_TRITON else "reference",
}

_requested: ContextVar[str | None] = ContextVar("svg2_requested_implementation", default=None)


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block by the implementation called ``name``, or raise; never fall back.

    Errors: ValueError for an unknown name here, and by an op whose tensors are on a device that ``name`` does not
    serve.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"use_implementation: name is {name!r}; valid: {', '.join(sorted(IMPLEMENTATIONS))}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def implementation_for(device: torch.device) -> str:
    """Name of the implementation that serves ``device`` now. Raises ValueError where there is none."""
    requested = _requested.get()
    if requested is not None:
        served = IMPLEMENTATIONS[requested].devices
        if device.type not in served:
            raise ValueError(
                f"implementation {requested!r} was requested for tensors on {device.type}; "
                f"valid for it: {', '.join(served)}"
            )
        problem = _native_problem() if requested == "native" else None
        if problem is not None:
            raise ValueError(f"implementation 'native' was requested, but there is no native code: {problem}")
        return requested
    if device.type not in DEFAULT_IMPLEMENTATION:
        raise ValueError(
            f"svg2 ops have no implementation for device {device.type!r}; valid: {', '.join(DEFAULT_IMPLEMENTATION)}"
        )
    chosen = DEFAULT_IMPLEMENTATION[device.type]
    return "cpu" if chosen == "native" and _native_problem() is not None else chosen


def _native_problem() -> str | None:
    """Why there is no native code for the CPU; None where there is."""
    # By its name, as implementations are: they stand above this file.
    native = importlib.import_module("svg2_compile.kernels.cpu.native.build").native()
    return None if native.library is not None else native.detail


def run_implementation(op: str, device: torch.device, *args: Any) -> Any:
    """What the implementation that serves ``device`` now makes of the op called ``op``.

    Autocast is off inside: the op's contract says in which dtype it computes, and an ambient autocast would shorten
    the distances of k-means and the scores that blocks are chosen by.
    """
    module = importlib.import_module(IMPLEMENTATIONS[implementation_for(device)].module)
    with torch.autocast(device.type, enabled=False):
        return getattr(module, op)(*args)
