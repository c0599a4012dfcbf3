"""Run time: the session that the compiled graphs of one model share, and its choice between dense and sparse."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.centroid_store import CentroidStore
from svg2_compile.runtime.clock import StepClock, Tick, TimeReading, TimestepClock, dense_step_count
from svg2_compile.runtime.history import RunHistory
from svg2_compile.runtime.layers import Layer, LayerTable, ModuleScope
from svg2_compile.runtime.time_reader import TimeReader
from svg2_compile.settings.config import Svg2Config

__all__ = ["CallPlan", "Session", "report_of", "sessions"]

log = get_logger()

# Every session that is alive, so that report() and reset() find those that nobody holds a handle of.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@dataclass(frozen=True)
class CallPlan:
    """The decision for one call of a program."""

    layer: Layer
    tick: Tick | None
    sparse: bool
    reason: str


class Program(Protocol):
    """What a session needs to know of a program (see DenoisingProgram) to plan its calls and to report on it."""

    number: int
    name: str
    dense: CompiledGraph
    sparse: CompiledGraph | None
    regional: bool
    time_reader: TimeReader
    layers: LayerTable
    graph_report: GraphReport

    @property
    def num_layers(self) -> int:
        """How many layers the program serves in one model call, as far as seen."""

    def site_reports(self) -> list[SiteReport]:
        """Every attention of the program's graph."""


class Session:
    """What the compiled graphs of one model share: configuration, clock, centroids and history.

    The plain backend makes one for each graph that Dynamo hands over, a transformed program one of its own; ``enable``
    makes one for a whole pipeline.
    """

    def __init__(self, config: Svg2Config, clock: StepClock | None = None) -> None:
        self.config = config
        self.clock: StepClock = clock if clock is not None else TimestepClock()
        self.store = CentroidStore(int(config.store_limit_mb * 2**20))
        self.scope = ModuleScope()
        self.history = RunHistory()
        self.programs: weakref.WeakSet[Program] = weakref.WeakSet()
        self._videos: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.once = Once(log)
        _sessions.add(self)

    def reset(self) -> None:
        """Drop all centroids and forget where in a video we are; the next call begins a video."""
        self.store.clear()
        self.clock.reset()

    def fail(self, layer: Layer) -> None:
        """An exception ended a call of ``layer``: nothing of this video is carried on."""
        self.store.drop(layer)
        if isinstance(self.clock, TimestepClock):
            self.clock.forget(layer)

    def plan(self, program: Program, args: Sequence[Any]) -> CallPlan:
        """Decide which graph of ``program`` runs this call."""
        reading = program.time_reader.read(args) if self.clock.needs_reading else None
        layer = program.layers.find(args, self.scope, self._model_call(program, reading))
        tick = self.clock.tick(layer, reading)
        if tick is None:
            return self._plan_without_time(program, layer)
        if self._videos.get(layer) != tick.video:
            self.store.drop(layer)
            self._videos[layer] = tick.video
        if self._is_dense_step(tick):
            return CallPlan(layer, tick, False, "dense_steps")
        if program.regional and self._is_dense_layer(program, layer):
            return CallPlan(layer, tick, False, "dense_layers")
        return CallPlan(layer, tick, True, "sparse")

    def _model_call(self, program: Program, reading: TimeReading | None) -> Any:
        if reading is not None:
            return program.time_reader.reads
        return getattr(self.clock, "video", None), getattr(self.clock, "step", None)

    def _plan_without_time(self, program: Program, layer: Layer) -> CallPlan:
        if self.config.dense_steps == 0:
            self.once.warning(
                "no_timestep",
                "%s: no input tells the timestep, so every call starts k-means cold. "
                "svg2_compile.enable(pipe) ties the steps to the scheduler.",
                program.name,
            )
            return CallPlan(layer, None, True, "sparse")
        self.once.warning(
            "no_timestep",
            "%s stays dense: no input tells the timestep, so dense_steps=%s cannot be counted. "
            "Use svg2_compile.enable(pipe), which ties the steps to the scheduler, or set dense_steps=0.",
            program.name,
            self.config.dense_steps,
        )
        return CallPlan(layer, None, False, "no_timestep")

    def _is_dense_step(self, tick: Tick) -> bool:
        dense_steps = self.config.dense_steps
        if isinstance(dense_steps, int):
            return tick.step < dense_steps
        if dense_steps == 0.0:
            return False
        if tick.num_steps is not None:
            return tick.step < dense_step_count(dense_steps, tick.num_steps)
        self.once.warning(
            "unknown_schedule",
            "the length of the schedule is unknown: dense_steps=%s is taken as a fraction of the timestep's range. "
            "svg2_compile.enable(pipe) reads the scheduler; an integer counts steps.",
            dense_steps,
        )
        # Without a timestep value, a count of ten is the published setting (20 % of 50 steps).
        return tick.step < 10 if tick.progress is None else tick.progress < dense_steps

    def _is_dense_layer(self, program: Program, layer: Layer) -> bool:
        dense_layers = self.config.dense_layers
        if isinstance(dense_layers, float):
            dense_layers = math.ceil(dense_layers * max(program.num_layers, layer.ordinal + 1) - 1e-9)
        return layer.ordinal < dense_layers


def sessions() -> list[Session]:
    """All sessions that are alive."""
    return list(_sessions)


def report_of(chosen: Sequence[Session]) -> Report:
    """What was decided and what ran in some sessions."""
    result = Report()
    for session in chosen:
        for program in sorted(session.programs, key=lambda program: program.number):
            result.sites.extend(program.site_reports())
            result.graphs.append(program.graph_report)
        result.runs.extend(session.history.site_records())
        result.store_bytes += session.store.num_bytes
        result.store_entries += session.store.num_entries
    return result
