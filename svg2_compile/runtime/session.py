"""Run time: the session that the compiled graphs of one model share, and its choice between dense and sparse."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.centroid_store import CentroidStore
from svg2_compile.runtime.clock import StepClock, Tick, TimeReading, TimestepClock, dense_step_count
from svg2_compile.runtime.history import RunHistory
from svg2_compile.runtime.layers import Layer, ModuleScope
from svg2_compile.settings.config import Svg2Config

if TYPE_CHECKING:
    from svg2_compile.runtime.program import DenoisingProgram

__all__ = ["CallPlan", "Session", "TimeReader", "report_of", "sessions"]

log = get_logger()

# Every session that is alive, so that report() and reset() find those that nobody holds a handle of.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()

# How many numbers of a modulation tensor are compared to tell one timestep from another.
_SAMPLES = 8


@dataclass(frozen=True)
class CallPlan:
    """The decision for one call of a program."""

    layer: Layer
    tick: Tick | None
    sparse: bool
    reason: str


class TimeReader:
    """Reads time from the inputs of a graph: at most one host read for each model call.

    Args:
        kind: "timestep" or "modulation" (see TimeReading).
        positions: which inputs of the graph tell.
    """

    def __init__(self, kind: str, positions: Sequence[int]) -> None:
        self.kind = kind
        self.positions = tuple(positions)
        self._seen: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._reading = TimeReading(kind, ())
        self.reads = 0

    def read(self, args: Sequence[Any]) -> TimeReading:
        """The reading of this call; ``reads`` counts the host reads, which tells model calls apart."""
        inputs = [args[position] for position in self.positions]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.numel()]
        numbers = tuple(float(value) for value in inputs if isinstance(value, (int, float)))
        if not tensors:
            self.reads += 1
            return TimeReading(self.kind, numbers)
        # A block compiled alone is handed one tensor object for all layers of a model call: reading it once is enough.
        # A timestep is read at every call, which is once per model call: users may refill one tensor in place.
        if self.kind == "timestep" or not self._same(tensors):
            self._reading = TimeReading(self.kind, numbers + self._host_read(tensors))
            self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]
            self.reads += 1
        return self._reading

    def _same(self, tensors: list[torch.Tensor]) -> bool:
        if len(tensors) != len(self._seen):
            return False
        return all(
            reference() is tensor and version == _version(tensor)
            for tensor, (reference, version) in zip(tensors, self._seen, strict=True)
        )

    def _host_read(self, tensors: list[torch.Tensor]) -> tuple[float, ...]:
        with torch.no_grad():
            if self.kind == "timestep":
                # Image-to-video models give clean frames the timestep 0: the largest is the schedule's.
                samples = [tensor.detach().to(torch.float64).amax().reshape(1) for tensor in tensors]
            else:
                samples = [_sample(tensor.detach()) for tensor in tensors]
            return tuple(torch.cat(samples).tolist())


def _version(tensor: torch.Tensor) -> int:
    """The mutation count of a tensor; tensors made under inference_mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few numbers spread over a tensor, as float64."""
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    return flat[::stride][:_SAMPLES].to(torch.float64)


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
        self.programs: weakref.WeakSet[DenoisingProgram] = weakref.WeakSet()
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

    def plan(self, program: DenoisingProgram, args: Sequence[Any]) -> CallPlan:
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

    def _model_call(self, program: DenoisingProgram, reading: TimeReading | None) -> Any:
        if reading is not None:
            return program.time_reader.reads
        return getattr(self.clock, "video", None), getattr(self.clock, "step", None)

    def _plan_without_time(self, program: DenoisingProgram, layer: Layer) -> CallPlan:
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

    def _is_dense_layer(self, program: DenoisingProgram, layer: Layer) -> bool:
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
