"""Steps as schedulers tell them: diffusers' own, copies and late entries included, without a read of a device."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from svg2_compile.runtime.pipelines import running_pipeline, view_of
from svg2_compile.runtime.requests import Requests
from svg2_compile.runtime.scheduler import StepCount
from svg2_compile.runtime.standing import Said

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, Any] = {
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(),
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
}
SAMPLE = torch.zeros(1, 2, 1, 4, 4)


class _Recorder:
    """Stands for a session: which request and step every call is found to be in."""

    def __init__(self) -> None:
        self.requests = Requests(self.over)
        self.closed: list[int] = []

    def over(self, request: Any) -> None:
        self.closed.append(request.video)

    def call(
        self, scheduler: Any, pipeline: Any = None, counted: int | None = None
    ) -> tuple[int, int, int | None, str]:
        def read() -> Any:
            raise AssertionError("a pipeline tells: nothing is to be read")

        view = view_of(scheduler, pipeline, counted)
        found = self.requests.locate(Said(), view, read, "model")
        assert found is not None
        request, source = found
        return request.video, request.step, request.num_steps, source


class Loop:
    """A pipeline as diffusers writes them: what its class keeps while it is called."""

    def __init__(self, scheduler: Any, call: Any) -> None:
        self.scheduler = scheduler
        self.call = call

    def __call__(self, steps: int, start: int = 0, tell_start: bool = True, branches: int = 2) -> list[Any]:
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[start:]
        if start and tell_start and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        self._num_timesteps = len(timesteps)
        sample = SAMPLE
        told = []
        for t in timesteps:
            self._current_timestep = t
            for _ in range(branches):
                pipeline = running_pipeline()
                assert pipeline is self
                told.append(self.call(pipeline.scheduler, pipeline))
            sample = self.scheduler.step(torch.zeros_like(SAMPLE), t, sample, return_dict=False)[0]
        self._current_timestep = None
        return told


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_tells_its_steps(name: str) -> None:
    recorder = _Recorder()
    loop = Loop(SCHEDULERS[name](), recorder.call)
    for video in range(2):
        told = loop(6)
        length = len(loop.scheduler.timesteps)  # schedulers of second order have more
        assert told == [(video, step, length, "scheduler") for step in range(length) for _ in range(2)]


@pytest.mark.parametrize("tell_start", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("name", ["flow euler", "unipc", "euler", "ddim"])
def test_a_schedule_entered_late_counts_the_steps_that_run(name: str, tell_start: bool) -> None:
    recorder = _Recorder()
    told = Loop(SCHEDULERS[name](), recorder.call)(10, start=6, tell_start=tell_start)
    assert told == [(0, step, 4, "scheduler") for step in range(4) for _ in range(2)]


def test_without_a_pipeline_the_scheduler_is_enough() -> None:
    """A loop of the user's own, over a scheduler that is counted from outside."""
    recorder, count = _Recorder(), StepCount()
    for name in ("flow euler", "ddim"):
        scheduler = SCHEDULERS[name]()
        count.follow(scheduler)
        for video in range(2):
            scheduler.set_timesteps(5)
            for step, t in enumerate(scheduler.timesteps):
                count.follow(scheduler)
                _, told, length, _ = recorder.call(scheduler, counted=count.steps_of(scheduler))
                assert (told, length) == (step, 5), (name, video)
                scheduler.step(torch.zeros_like(SAMPLE), t, SAMPLE)
    count.stop()
    assert "step" not in vars(scheduler) and "set_timesteps" not in vars(scheduler)


def test_copies_of_a_scheduler_are_requests_of_their_own() -> None:
    recorder = _Recorder()
    first = diffusers.FlowMatchEulerDiscreteScheduler()
    first.set_timesteps(4)
    assert recorder.call(first, counted=0)[:2] == (0, 0)
    second = copy.deepcopy(first)
    second.set_timesteps(4)
    assert recorder.call(second, counted=0)[:2] == (1, 0)
    first.step(torch.zeros_like(SAMPLE), first.timesteps[0], SAMPLE)
    assert recorder.call(first)[:2] == (0, 1)
    assert recorder.call(second, counted=0)[:2] == (1, 0)
    assert recorder.closed == []


def test_an_aborted_video_is_over_when_the_next_one_begins() -> None:
    recorder = _Recorder()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    recorder.call(scheduler, counted=0)
    scheduler.step(torch.zeros_like(SAMPLE), scheduler.timesteps[0], SAMPLE)
    assert recorder.call(scheduler)[1] == 1
    scheduler.set_timesteps(4)
    assert recorder.call(scheduler, counted=0)[:2] == (1, 0)
    assert recorder.closed == [0]


def test_the_request_of_a_scheduler_that_is_gone_is_closed() -> None:
    recorder = _Recorder()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    recorder.call(scheduler, counted=0)
    del scheduler
    other = diffusers.FlowMatchEulerDiscreteScheduler()
    other.set_timesteps(4)
    recorder.call(other, counted=0)
    assert recorder.closed == [0]


def test_diffusion_forcing_moves_by_its_own_timesteps() -> None:
    """SkyReels-V2 steps copies of its scheduler, one a frame: the pipeline's own scheduler stands still."""
    recorder = _Recorder()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    matrix = torch.tensor([[999.0, 999.0], [800.0, 999.0], [500.0, 800.0], [500.0, 500.0]])

    class Pipeline:
        _num_timesteps = 4
        _current_timestep: Any = None

    pipeline = Pipeline()
    told = []
    for _ in range(2):  # a long video is made window by window
        for row in matrix:
            pipeline._current_timestep = row
            told += [recorder.call(scheduler, pipeline) for _ in range(2)]
    assert [(video, step) for video, step, _, _ in told] == [
        (video, step) for video in (0, 1) for step in range(4) for _ in range(2)
    ]


def test_a_scheduler_left_at_its_end_tells_nothing() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        assert view_of(scheduler, counted=0).tells
        scheduler.step(torch.zeros_like(SAMPLE), t, SAMPLE)
    assert not view_of(scheduler).tells
    assert not view_of(object()).tells


def test_the_innermost_pipeline_is_found() -> None:
    found = []
    inner = Loop(SCHEDULERS["ddim"](), lambda scheduler, pipeline: found.append(pipeline))

    def call_the_inner(scheduler: Any, pipeline: Any) -> None:
        found.append(pipeline)
        inner(1, branches=1)

    outer = Loop(SCHEDULERS["ddim"](), call_the_inner)
    assert running_pipeline() is None
    outer(1, branches=1)
    assert found == [outer, inner]
