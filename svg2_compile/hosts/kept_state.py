"""Calls of a model that leave no trace in it: for a call that is made again only to be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["kept_state"]

_CONTAINERS = (list, dict, set)


@contextlib.contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """Afterwards the attributes and buffers of ``module`` and of those inside it are what they were before.

    Covers what models keep between calls: counters, cached tensors, lists and dictionaries of these, buffers that are
    written in place. Not the inside of objects of other classes.
    """
    modules = list(module.modules())
    attributes = [(part, dict(vars(part))) for part in modules]
    containers = [
        (value, value.copy())
        for _, held in attributes
        for name, value in held.items()
        if type(value) in _CONTAINERS and not name.endswith("hooks")
    ]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, held in attributes:
            _put_back(vars(part), held)
        for value, before in containers:
            if isinstance(value, dict):
                _put_back(value, before)
            elif isinstance(value, set):
                value ^= value ^ before
            elif [id(item) for item in value] != [id(item) for item in before]:
                value[:] = before
        for buffer, before in buffers:
            if not buffer.equal(before):
                buffer.data.copy_(before)


def _put_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Touches only what has changed: another thread may be reading."""
    for name in [name for name in held if name not in before]:
        del held[name]
    for name, value in before.items():
        if name not in held or held[name] is not value:
            held[name] = value
