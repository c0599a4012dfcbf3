"""CompiledGraph: a graph that the inner backend compiles the first time that it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._guards import TracingContext, tracing

__all__ = ["Compile", "CompiledGraph"]

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class CompiledGraph:
    """A graph that the inner backend compiles the first time that it is needed.

    Args:
        gm: the graph.
        examples: fake inputs to compile with.
        compile_inner: the inner backend.
    """

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], compile_inner: Compile) -> None:
        self.gm = gm
        self.compile_seconds: float | None = None
        self._examples = examples
        self._compile_inner = compile_inner
        self._run: Callable[..., Any] | None = None
        # Dynamo's context knows the shape environment and where each input comes from. It is gone after Dynamo has
        # finished with the frame, so it is kept until it was used.
        self._context = TracingContext.try_get()

    @property
    def compiled(self) -> bool:
        return self._run is not None

    def compile(self, examples: Sequence[Any] | None = None) -> Callable[..., Any]:
        """Compile now, with the inputs given or the fake ones."""
        if self._run is None:
            begin = time.perf_counter()
            inputs = list(examples if examples is not None else self._examples)
            if self._context is None or TracingContext.try_get() is self._context:
                self._run = self._compile_inner(self.gm, inputs)
            else:
                with tracing(self._context):
                    self._run = self._compile_inner(self.gm, inputs)
            self.compile_seconds = time.perf_counter() - begin
            self._context = None
            self._examples = ()
        return self._run

    def __call__(self, *args: Any) -> Any:
        return self.compile()(*args)
