"""A context that many threads are in at once: entered with the first, left with the last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

__all__ = ["SharedContext", "dynamo_context"]


def dynamo_context(make: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
    """What yields a context with Dynamo's settings patched as ``make`` does it, for many threads at once."""
    # Since torch 2.13 every thread has settings of its own. Before that they are the whole process's.
    if hasattr(torch._dynamo.config, "_hash_dirty_var"):
        return make
    shared = SharedContext(make)
    return lambda: shared


class SharedContext:
    """Settings of a whole process, patched while anybody needs them.

    If every thread patched them and put them back by itself, one would put back what another has patched.

    Args:
        make: yields the context to be in.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._inside = 0
        self._context: AbstractContextManager[Any] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                context = self._make()
                context.__enter__()
                self._context = context
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)
