"""Requests interleaved at random, compared call by call with the same request run alone.

A stateful test: requests come and go, take turns, skip branches, change size, fail and go on; the model is disabled and
enabled again in between. Whatever happened elsewhere, every call returns to the bit what it returns when its request is
alone with the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import svg2_compile
from svg2_compile.runtime.program import DenoisingProgram
from tests.support import SELECTION

pytestmark = pytest.mark.slow

NUM_STEPS = 5
OPTIONS = {**SELECTION, "num_q_clusters": 3, "num_k_clusters": 5, "init_iters": 2, "dense_steps": 1}
SIZES = ((1, 8, 8), (2, 8, 8))
BRANCHES = ("cond", "uncond")


def _model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.WanTransformer3DModel(
            **{"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4},
            **{"out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 16},
        ).eval()


class Failure(BaseException):
    """As an interrupt: what is no error of the graph ends the call."""


@dataclass
class Request:
    """One denoising loop and all that happened to it: ("call", step, branch, size, failed) or ("reset",)."""

    name: str
    size: int
    scheduler: Any
    step: int = 0
    events: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


class Loop:
    """One step of a pipeline: the scheduler that it has now tells where its calls stand."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, call: Any) -> torch.Tensor:
        return call()


class Runner:
    """Runs events of requests on one model. told: by "context" or by the "scheduler" of each request."""

    def __init__(self, model: Any, told: str, regional: bool) -> None:
        self.model, self.told, self.regional = model, told, regional
        self.enabled: Any = None
        self.enable()

    def enable(self) -> None:
        self.enabled = svg2_compile.enable(self.model, self.regional, **OPTIONS)

    def call(self, request: Request, step: int, branch: str, size: int, fails: bool) -> torch.Tensor | None:
        frames, height, width = SIZES[size]
        generator = torch.Generator().manual_seed(hash((request.name, step, branch == "cond")) % 2**31)
        inputs = {
            "hidden_states": torch.randn(1, 4, frames, height, width, generator=generator),
            "encoder_hidden_states": torch.randn(1, 4, 8, generator=generator),
            "timestep": torch.tensor([999 - 100 * step]),
        }

        def run() -> torch.Tensor:
            with torch.no_grad(), _failing(fails):
                return self.model(**inputs, return_dict=False)[0]

        try:
            if self.told == "context":
                with svg2_compile.denoising(request=request.name, step=step, num_steps=NUM_STEPS, branch=branch):
                    return run()
            with self.model.cache_context(branch):
                return Loop(request.scheduler)(run)
        except Failure:
            return None


@contextlib.contextmanager
def _failing(fails: bool) -> Iterator[None]:
    """Within it, every sparse graph raises, if ``fails``."""
    with pytest.MonkeyPatch.context() as patch:
        if fails:
            patch.setattr(DenoisingProgram, "_run_sparse", _raise)
        yield


def _raise(*_: Any) -> None:
    raise Failure


class Interleaving(RuleBasedStateMachine):
    """The machine; subclasses say how steps are told and how the model is compiled."""

    told = "context"
    regional = False
    runners: ClassVar[dict[tuple[str, bool], tuple[Runner, Runner]]] = {}

    def __init__(self) -> None:
        super().__init__()
        key = (self.told, self.regional)
        if key not in self.runners:
            # Compiled once for all examples; every example begins with a reset.
            self.runners[key] = Runner(_model(), *key), Runner(_model(), *key)
        self.together, self.alone = self.runners[key]
        for runner in (self.together, self.alone):
            runner.enabled.reset()
        self.requests: list[Request] = []

    @initialize()
    def first(self) -> None:
        self.begin(0)

    @precondition(lambda self: len(self.requests) < 4)
    @rule(size=st.integers(0, 1))
    def begin(self, size: int) -> None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(NUM_STEPS)
        self.requests.append(Request(f"request {len(self.requests)}", size, scheduler))

    @rule(which=st.integers(0, 3), branches=st.lists(st.sampled_from(BRANCHES), min_size=1, max_size=2, unique=True))
    def make_a_step(self, which: int, branches: list[str]) -> None:
        request = self.requests[which % len(self.requests)]
        for branch in branches:
            self._call(request, branch)
        self._end_step(request)

    @rule(which=st.integers(0, 3))
    def change_size(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        request.size = 1 - request.size

    @rule(which=st.integers(0, 3))
    def fail(self, which: int) -> None:
        self._call(self.requests[which % len(self.requests)], "cond", fails=True)

    @rule(which=st.integers(0, 3))
    def begin_again(self, which: int) -> None:
        """An aborted video; the next one of the same request."""
        request = self.requests[which % len(self.requests)]
        if request.step:
            self._restart(request)

    @rule(really=st.integers(0, 7))
    def disable_and_enable(self, really: int) -> None:
        if really:  # compiling anew takes longer than all else
            return
        self.together.enabled.disable()
        self.together.enable()
        for request in self.requests:
            request.events.append(("reset",))

    @invariant()
    def the_store_has_open_videos_only(self) -> None:
        session = self.together.enabled.session
        assert session.store.num_entries <= 2 * 2 * 2 * len(session.requests.open())

    def _call(self, request: Request, branch: str, fails: bool = False) -> None:
        output = self.together.call(request, request.step, branch, request.size, fails)
        request.events.append(("call", request.step, branch, request.size, fails))
        if output is not None:
            request.outputs.append(output)

    def _end_step(self, request: Request) -> None:
        if request.step == NUM_STEPS - 1:
            self._restart(request)
            return
        sample = torch.zeros(1)
        request.scheduler.step(sample, request.scheduler.timesteps[request.step], sample)
        request.step += 1
        request.events.append(("step",))

    @staticmethod
    def _restart(request: Request) -> None:
        request.scheduler.set_timesteps(NUM_STEPS)
        request.step = 0
        request.events.append(("restart",))

    def teardown(self) -> None:
        for request in self.requests:
            self.alone.enabled.reset()
            for number, output in enumerate(self._replayed(request)):
                assert torch.equal(output, request.outputs[number]), (request.name, request.events)

    def _replayed(self, request: Request) -> list[torch.Tensor]:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(NUM_STEPS)
        twin = Request(request.name, 0, scheduler)
        outputs = []
        for event in request.events:
            if event[0] == "call":
                output = self.alone.call(twin, *event[1:])
                outputs += [] if output is None else [output]
            elif event[0] == "step":
                sample = torch.zeros(1)
                scheduler.step(sample, scheduler.timesteps[twin.step], sample)
                twin.step += 1
            elif event[0] == "restart":
                scheduler.set_timesteps(NUM_STEPS)
                twin.step = 0
            else:
                self.alone.enabled.reset()
        return outputs


EXAMPLES = settings(
    max_examples=125,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def _machine(told: str, regional: bool) -> Any:
    machine: Any = type(f"Interleaving_{told}_{regional}", (Interleaving,), {"told": told, "regional": regional})
    case = machine.TestCase
    case.settings = EXAMPLES
    return case


@pytest.fixture(autouse=True, scope="module")
def _disabled_afterwards() -> Any:
    yield
    for runners in Interleaving.runners.values():
        for runner in runners:
            runner.enabled.disable()
    Interleaving.runners.clear()


TestToldByContext = _machine("context", False)
TestToldByContextRegional = _machine("context", True)
TestToldBySchedulers = _machine("scheduler", False)
TestToldBySchedulersRegional = _machine("scheduler", True)


def test_copies_of_requests_are_what_they_were() -> None:
    """The replay relies on schedulers that behave alike when copied."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    copied = copy.deepcopy(scheduler)
    assert torch.equal(copied.timesteps, scheduler.timesteps)
