"""Diffusers' context parallelism as Dynamo traces it. Imports no diffusers.

``enable_parallelism`` splits and gathers tokens in hooks. Two things in these break a graph that need not: at their
first call they look an argument's place up in the signature, and they say once that a tensor is not split. The place is
looked up beforehand, and what is said is left out of the graph.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["is_context_parallel", "prepare_hooks", "untraced_messages"]


def prepare_hooks(module: nn.Module) -> None:
    """Look up what the hooks of ``module`` and its parts would look up at their first call."""
    for hook in _hooks(module):
        metadata = getattr(hook, "module_forward_metadata", None)
        if getattr(metadata, "cached_parameter_indices", 0) is not None:
            continue
        cls = getattr(metadata, "_cls", None)
        if isinstance(cls, type) and callable(getattr(cls, "forward", None)):
            names = list(inspect.signature(cls.forward).parameters)[1:]
            metadata.cached_parameter_indices = {name: place for place, name in enumerate(names)}  # type: ignore[union-attr]


def is_context_parallel(module: nn.Module) -> bool:
    """Whether tokens of ``module`` are split over ranks by hooks of diffusers."""
    return any(hasattr(hook, "parallel_config") for hook in _hooks(module))


def untraced_messages() -> set[Callable[..., Any]]:
    """What diffusers says once from inside of a hook: a method of loggers, there since diffusers was imported."""
    said_once = getattr(logging.Logger, "warning_once", None)
    return set() if said_once is None else {said_once}


def _hooks(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        yield from getattr(registry, "hooks", {}).values()
