"""The call of a model that is under way in this thread or coroutine, for those who know it: ``enable`` and its like.

A compiled graph sees neither the model that it is a piece of, nor which call of it this is. Whoever wraps the model
says so here; layers that Dynamo compiled alone, and pieces between graph breaks, then belong to one call.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from svg2_compile.runtime.standing import Standing

__all__ = ["ModelCall", "Part", "current_call", "current_part", "running_model", "running_part"]


class ModelCall:
    """One call of a model.

    Attributes:
        owner: the session that it belongs to; calls of other sessions' graphs inside it are none of its business.
        module: the model. label: its name in a pipeline with several, else empty.
        timesteps: the arguments that carry timesteps, empty if none was recognised.
        standing: where the call stands, found at the first need. located: whether it was looked for.
        request: the Request of that. occurrences: how often each layer was called. graphs: how many compiled graphs
            ran; graphs_with_attention: how many of them have one.
        patches: yields how many patches the video input has, None where that cannot be told.
        video_tokens: lengths of the attentions that ran sparse in blocks of their own.
        memo: what is remembered from call to call of this model, for as long as it is enabled.
    """

    def __init__(
        self,
        owner: Any,
        module: torch.nn.Module,
        label: str,
        timesteps: Callable[[], list[Any]],
        memo: dict[str, Any] | None = None,
        patches: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.owner = owner
        self.module = module
        self.label = label
        self.timesteps = timesteps
        self.standing: Standing | None = None
        self.request: Any = None
        self.located = False
        self.occurrences: Counter[Any] = Counter()
        self.memo = {} if memo is None else memo
        self.graphs = 0
        self.graphs_with_attention = 0
        self.patches = patches
        self.video_tokens: set[int] = set()


class Part:
    """A module that was compiled on its own, or whatever stands for it, and its path in the model."""

    __slots__ = ("label", "module", "owner")

    def __init__(self, owner: Any, module: Any, label: str) -> None:
        self.owner = owner
        self.module = module
        self.label = label


_call: ContextVar[ModelCall | None] = ContextVar("svg2_model_call", default=None)
_part: ContextVar[Part | None] = ContextVar("svg2_part", default=None)


def current_call(owner: Any) -> ModelCall | None:
    """The call of a model of ``owner`` that is under way; None if nobody said."""
    call = _call.get()
    return call if call is not None and call.owner is owner else None


def current_part(owner: Any) -> Part | None:
    """The part of ``owner``'s model that runs; None if nobody said."""
    part = _part.get()
    return part if part is not None and part.owner is owner else None


@contextlib.contextmanager
def running_model(call: ModelCall) -> Iterator[ModelCall]:
    """While inside, graphs of ``call.owner`` belong to ``call``."""
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


@contextlib.contextmanager
def running_part(part: Part) -> Iterator[None]:
    """While inside, graphs of ``part.owner`` are those of ``part``."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)
