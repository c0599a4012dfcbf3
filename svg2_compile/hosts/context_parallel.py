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

__all__ = ["not_traced", "prepare_hooks", "untraced_messages"]


def prepare_hooks(module: nn.Module) -> None:
    """Look up what the hooks of ``module`` and its parts would look up at their first call."""
    for hook in _hooks(module):
        metadata = getattr(hook, "module_forward_metadata", None)
        if getattr(metadata, "cached_parameter_indices", 0) is not None:
            continue
        forward = getattr(getattr(metadata, "_cls", None), "forward", None)
        if callable(forward):
            names = list(inspect.signature(forward).parameters)[1:]
            metadata.cached_parameter_indices = {name: place for place, name in enumerate(names)}  # type: ignore[union-attr]


def not_traced(module: nn.Module) -> str | None:
    """Why ``module`` is not to be compiled at all; None where it may be.

    Shards of any size ask for each other's sizes in the middle of the model, by a function that Dynamo is told to take
    as it is but cannot: the call would end with its error.
    """
    for hook in _hooks(module):
        config = getattr(hook, "parallel_config", None)
        for option in ("ulysses_anything", "ring_anything"):
            if getattr(config, option, False):
                return (
                    f"{type(module).__name__} runs dense and is not compiled: {option}=True makes shards of different "
                    "sizes, which are not followed. ContextParallelConfig(ulysses_degree=...) alone runs sparse, where "
                    "tokens and heads can be divided by it."
                )
    return None


def untraced_messages() -> set[Callable[..., Any]]:
    """What diffusers says once from inside of a hook: a method of loggers, there since diffusers was imported."""
    said_once = getattr(logging.Logger, "warning_once", None)
    return set() if said_once is None else {said_once}


def _hooks(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        yield from getattr(registry, "hooks", {}).values()
