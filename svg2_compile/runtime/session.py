"""The session that the compiled graphs of one model share, and its choice between dense and sparse at every call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.agreement import RANKS_DIFFER, agreed
from svg2_compile.runtime.centroid_store import CentroidStore
from svg2_compile.runtime.dense_rules import DenseLayers, dense_step_reason
from svg2_compile.runtime.densities import density_of_step
from svg2_compile.runtime.history import RunHistory
from svg2_compile.runtime.layers import Layer, Layers, ParameterPaths
from svg2_compile.runtime.model_call import ModelCall, current_call, current_part
from svg2_compile.runtime.pipelines import SchedulerView, running_pipeline, view_of
from svg2_compile.runtime.plan import CallPlan, Program
from svg2_compile.runtime.request import Request
from svg2_compile.runtime.requests import Requests
from svg2_compile.runtime.scheduler import StepCount
from svg2_compile.runtime.silence import SilenceWatch
from svg2_compile.runtime.standing import Standing, said_now
from svg2_compile.runtime.time_reader import TimeReading, timestep_reading
from svg2_compile.settings.config import Svg2Config

__all__ = ["Session", "report_of", "sessions"]

log = get_logger()

# Every session that is alive, so that report() and reset() find those that nobody holds a handle of.
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """What the compiled graphs of one model share: configuration, requests, centroids and history.

    The plain backend makes one for each graph that Dynamo hands over, a transformed program one of its own; ``enable``
    makes one for a whole pipeline. Requests in several threads share it: what belongs to one request is touched by its
    own thread only, the rest under a lock.

    Args:
        config: the settings.
        scheduler: yields the scheduler that drives the model, as it is now, where no pipeline is being called.
        expected_layers: how many layers a model has, as far as its modules tell.
        num_layers: how many layers the only model has, where no call tells which it is; None if nobody knows.
    """

    def __init__(
        self,
        config: Svg2Config,
        scheduler: Callable[[], Any] | None = None,
        expected_layers: Callable[[torch.nn.Module], int | None] = lambda module: None,
        num_layers: int | None = None,
    ) -> None:
        self.config = config
        self.store = CentroidStore(int(config.store_limit_mb * 2**20))
        self.history = RunHistory()
        self.programs: weakref.WeakSet[Program] = weakref.WeakSet()
        self.once = Once(log)
        self.watch = SilenceWatch(self.once)
        self.step_count = StepCount(self._schedule_over)
        self.requests = Requests(self._over)
        self.layers = Layers(self._forget)
        # Made by the plain backend, which knows models by their weights only.
        self.of_backend = False
        self._scheduler = scheduler
        self._expected_layers = expected_layers
        self._dense_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._dense_layers_alone = DenseLayers(config.dense_layers, num_layers)
        self._lock = threading.RLock()
        _sessions.add(self)

    def reset(self) -> None:
        """Drop all centroids and forget where in a video we are; the next call begins a video."""
        with self._lock, self.watch.quiet():
            self.requests.clear()
            self.store.clear()

    def _forget(self, layer: Layer) -> None:
        """The weights of ``layer`` are gone."""
        with self._lock:
            self.store.drop_layer(layer)

    def fail(self, plan: CallPlan) -> None:
        """An exception ended a call: nothing of its video is carried on."""
        if plan.request is not None:
            with self._lock, self.watch.quiet():
                self.requests.close(plan.request)

    def plan(self, program: Program, args: Sequence[Any], stays_dense: str | None = None) -> CallPlan:
        """Decide which graph of ``program`` runs this call. stays_dense: why it is the dense one, if that is known."""
        call = current_call(self)
        with self._lock:
            layer = program.layers.find(args, current_part(self), call, self._paths_of(call))
            located = self._locate(program, args, layer, call)
            plan = self._decide(program, layer, located, call, stays_dense)
            short = program.too_short(args) if plan.sparse else None
            if short is not None:
                plan = replace(plan, sparse=False, reason=short)
            terms = agreed(program, located, self.config, self.once)
            if plan.sparse and not terms.sparse:
                plan = replace(plan, sparse=False, reason=RANKS_DIFFER)
            if plan.request is not None:
                plan.request.note(plan.sparse, plan.reason)
            if plan.sparse and program.regional and call is not None:
                call.video_tokens |= program.video_tokens
            self.watch.ran(call, has_attention=True)
            return plan

    def ran_dense(self, program: Program, args: Sequence[Any]) -> None:
        """A graph runs that has no sparse form: a video of such calls alone is to be told of."""
        call = current_call(self)
        with self._lock:
            if call is not None and program.sites:
                self._locate(program, args, None, call)
            agreed(program, None, self.config, self.once)
            self.watch.ran(call, has_attention=bool(program.sites))

    def _decide(
        self,
        program: Program,
        layer: Layer,
        located: tuple[Request, Standing] | None,
        call: ModelCall | None,
        stays_dense: str | None,
    ) -> CallPlan:
        if stays_dense is not None:
            request, standing = located or (None, None)
            return CallPlan(layer, standing, request, False, stays_dense)
        if located is None:
            return self._plan_without_time(program, layer)
        request, standing = located
        reason = dense_step_reason(self.config, standing, self.once)
        if reason is None and program.regional and self.dense_layers(call).of_layer(layer, layer.label):
            reason = "dense_layers"
        return CallPlan(layer, standing, request, reason is None, reason or "sparse")

    def density(self, plan: CallPlan) -> float | None:
        """The density that a call is to have; None where a mass decides."""
        first = None if plan.request is None else plan.request.first_sparse_step
        return density_of_step(self.config, plan.standing, first, self.once)

    def after_model_call(self, call: ModelCall) -> None:
        """A call of the whole model has returned."""
        with self._lock:
            self.dense_layers(call).settle()
            self.watch.after_call(call, self.programs)

    def dense_layers(self, call: ModelCall | None = None) -> DenseLayers:
        """The decision about the model that is called, or (None) about the only one."""
        call = call or current_call(self)
        if call is None:
            return self._dense_layers_alone
        decision: DenseLayers | None = call.memo.get("dense_layers")
        if decision is None:
            decision = self._dense_layers.get(call.module)
            if decision is None:
                expected = self._expected_layers(call.module)
                decision = self._dense_layers[call.module] = DenseLayers(self.config.dense_layers, expected)
            call.memo["dense_layers"] = decision
        return decision

    def dense_layer_names(self) -> list[str]:
        """The layers with graphs of their own that stay dense."""
        decisions = [self._dense_layers_alone, *self._dense_layers.values()]
        return [name for decision in decisions for name in decision.names]

    # --------------------------------------------------------------------------------------------- where a call stands
    def _locate(
        self, program: Program, args: Sequence[Any], layer: Layer | None, call: ModelCall | None
    ) -> tuple[Request, Standing] | None:
        """The request of this call and where it stands; looked for once in a call of the whole model."""
        if call is not None and call.located:
            return None if call.standing is None else (call.request, call.standing)
        caller = layer if call is None else id(call.module)

        def read() -> TimeReading:
            timesteps = [] if call is None else call.timesteps()
            return timestep_reading(timesteps) if timesteps else program.time_reader.read(args)

        said = said_now()
        view = self._view()
        found = self.requests.locate(said, view, read, caller)
        located = None
        if found is not None:
            request, source = found
            if self.config.dense_timesteps is not None and source in ("context", "scheduler"):
                request.learn_timestep(view, read)
            located = request, request.standing(request.branch(caller, said.branch), source)
        if call is not None:
            call.located = True
            call.request, call.standing = located or (None, None)
        return located

    def _view(self) -> SchedulerView | None:
        pipeline = running_pipeline()
        own = self.follow_scheduler()
        scheduler = own if pipeline is None else pipeline.scheduler
        return None if scheduler is None else view_of(scheduler, pipeline, self.step_count.steps_of(scheduler))

    def follow_scheduler(self) -> Any:
        """The scheduler of the target as it is now; its steps are counted from now on. None if it has none.

        Raises:
            TypeError: it has no ``set_timesteps`` and ``step``.
        """
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is not None:
            self.step_count.follow(scheduler)
        return scheduler

    def _paths_of(self, call: ModelCall | None) -> ParameterPaths | None:
        if call is None:
            return None
        paths: ParameterPaths | None = call.memo.get("paths")
        if paths is None:
            paths = call.memo["paths"] = ParameterPaths(call.module)
        return paths

    def _plan_without_time(self, program: Program, layer: Layer) -> CallPlan:
        config = self.config
        if config.dense_steps == 0 and not config.dense_last_steps and config.dense_timesteps is None:
            self.once.warning(
                "no_timestep",
                "%s: no input tells the timestep, so every call starts k-means cold. svg2_compile.enable(pipe) ties "
                "the steps to the scheduler, svg2_compile.denoising(step=...) says them.",
                program.name,
            )
            return CallPlan(layer, None, None, True, "sparse")
        self.once.warning(
            "no_timestep",
            "%s stays dense: no input tells the timestep, so dense_steps=%s cannot be counted. "
            "Use svg2_compile.enable(pipe), which ties the steps to the scheduler, say them with "
            "svg2_compile.denoising(step=...), or set dense_steps=0.",
            program.name,
            config.dense_steps,
        )
        return CallPlan(layer, None, None, False, "no_timestep")

    def _schedule_over(self, scheduler: Any) -> None:
        """The scheduler of the target has made all its steps: branches that the last step left out are over too."""
        with self._lock:
            self.watch.schedule_over()
            for request in self.requests.open():
                if request.owner is not None and request.owner() is scheduler:
                    self.store.drop_video(request.video)

    def _over(self, request: Request) -> None:
        self.store.drop_video(request.video)
        self.watch.video_over(request, self.programs)


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
        result.dense_layers += [name for name in session.dense_layer_names() if name not in result.dense_layers]
        result.notes += session.watch.notes
    return result
