"""Which implementation of the ops runs: one table by device, and explicit requests that never fall back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Implementation(NamedTuple):
    """One implementation of all ops: a module with a function per op, and the device types that it serves."""

    module: str
    devices: tuple[str, ...]


IMPLEMENTATIONS = {
    "reference": Implementation("svg2_compile.kernels.reference", ("cpu", "cuda")),
    "cpu": Implementation("svg2_compile.kernels.cpu", ("cpu",)),
}

# What runs when nobody asks for anything, by device type. A device without an entry is an error, not a fallback.
DEFAULT_IMPLEMENTATION = {
    "cpu": "cpu",
    "cuda": "reference",
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
        return requested
    if device.type not in DEFAULT_IMPLEMENTATION:
        raise ValueError(
            f"svg2 ops have no implementation for device {device.type!r}; valid: {', '.join(DEFAULT_IMPLEMENTATION)}"
        )
    return DEFAULT_IMPLEMENTATION[device.type]


def load_implementation(device: torch.device) -> Any:
    """The module with a function per op that serves ``device`` now."""
    return importlib.import_module(IMPLEMENTATIONS[implementation_for(device)].module)
