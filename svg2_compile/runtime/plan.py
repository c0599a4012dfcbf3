"""The plan of one call of a program, and what plans know of programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.runtime.agreement import Talking
from svg2_compile.runtime.layers import Layer, LayerTable
from svg2_compile.runtime.request import Request
from svg2_compile.runtime.standing import Standing
from svg2_compile.runtime.time_reader import TimeReader

__all__ = ["CallPlan", "Program", "plan_now", "running_plan"]


@dataclass(frozen=True, slots=True)
class CallPlan:
    """The decision for one call of a program. standing: None where no step could be told."""

    layer: Layer
    standing: Standing | None
    request: Request | None
    sparse: bool
    reason: str


class Program(Talking, Protocol):
    """What a session needs to know of a program (see DenoisingProgram) to plan its calls and to report on it."""

    dense: CompiledGraph
    sparse: CompiledGraph | None
    regional: bool
    time_reader: TimeReader
    layers: LayerTable
    graph_report: GraphReport
    video_tokens: frozenset[int]

    def site_reports(self) -> list[SiteReport]:
        """Every attention of the program's graph."""

    def too_short(self, args: Sequence[Any]) -> str | None:
        """Why its attentions stay dense at the sizes of these inputs, if they do."""


_running: ContextVar[CallPlan | None] = ContextVar("svg2_running_plan", default=None)


@contextlib.contextmanager
def running_plan(plan: CallPlan) -> Iterator[None]:
    """While a sparse graph runs, :func:`plan_now` gives its plan to those who look on."""
    token = _running.set(plan)
    try:
        yield
    finally:
        _running.reset(token)


def plan_now() -> CallPlan | None:
    """The plan of the sparse graph that runs in this thread; None outside of one."""
    return _running.get()
