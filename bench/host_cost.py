"""What it costs on the host to know where a call stands: per compiled graph, and what is read from the device for it.

    python -m bench.host_cost            JSON in bench/results/host_cost.json
    python -m bench.host_cost --quick    fewer videos, nothing written

A small Wan (three layers) in diffusers' WanPipeline. Checked first: every call stands at the step that the loop is at.
Timed is all that an enabled model does for a call besides running graphs: finding the layer and the choice of the graph
(once for each graph), the request, the step and the branch (once for a call of the model), and what follows a call.

"plan" is timed in its place: here the tensors of the graph before it have driven out of the processor's caches what it
touches, and the limit is not for that. "again" is the same plan made anew at once, as where another device computes.

The alternative without any of this is to read the timestep from the inputs: "timestep" below, which synchronises with
the device at every call of the model.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import svg2_compile
from bench.common import Timing, write_results
from svg2_compile.runtime.model_call import ModelCall, current_call
from svg2_compile.runtime.session import Session
from tests.e2e.pipelines import SmallPipeline, build

STEPS, BRANCHES = 10, 2
OPTIONS: dict[str, Any] = {
    "min_tokens": 0,
    "dense_steps": 1,
    "dense_layers": 0,
    "inner_backend": "eager",
    "num_q_clusters": 4,
    "num_k_clusters": 8,
    "init_iters": 2,
}
LIMIT_US = 50.0


def by_pipeline(small: SmallPipeline) -> None:
    small.run(STEPS)


def by_context(small: SmallPipeline) -> None:
    _loop(small, lambda step, branch: svg2_compile.denoising(step=step, num_steps=STEPS, branch=branch))


def by_timestep(small: SmallPipeline) -> None:
    _loop(small, lambda step, branch: svg2_compile.denoising())


def _loop(small: SmallPipeline, said: Callable[[int, str], Any]) -> None:
    latents = torch.randn(1, 4, 2, 16, 16)
    for step in range(STEPS):
        for branch, prompt in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            with torch.no_grad(), said(step, branch):
                timestep, text = torch.tensor([999 - 100 * step]), small.arguments[prompt]
                small.pipe.transformer(latents, timestep, text, return_dict=False)


WAYS: dict[str, Callable[[SmallPipeline], None]] = {
    "scheduler": by_pipeline,
    "context": by_context,
    "timestep": by_timestep,
}


class HostReads(TorchDispatchMode):
    """Counts tensors whose value is read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While inside, the session's methods at a call go through ``around(name, method)``."""
    after = around("after", Session.after_model_call)
    with (
        mock.patch.object(Session, "plan", around("plan", Session.plan)),
        mock.patch.object(Session, "after_model_call", after),
    ):
        yield


def seconds_by_method(run: Callable[[], None]) -> dict[str, list[float]]:
    """Of every call of ``run``: "plan" and "after", in their places, and "again", the same plan made anew at once."""
    seconds: dict[str, list[float]] = {"plan": [], "after": [], "again": []}

    def around(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(session: Session, *args: Any) -> Any:
            call = current_call(session)
            before = None if call is None else (call.located, call.occurrences.copy())
            begin = time.perf_counter()
            result = method(session, *args)
            seconds[name].append(time.perf_counter() - begin)
            if name == "plan" and call is not None and before is not None:
                seconds["again"].append(_seconds_again(lambda: method(session, *args), call, before, result.request))
            return result

        return timed

    with watched(around):
        run()
    return seconds


def _seconds_again(plan: Callable[[], Any], call: ModelCall, before: tuple[bool, Counter[Any]], request: Any) -> float:
    """The seconds of a plan that is made twice more; the call and its request are left as they are now."""
    now = call.occurrences, request._calls.copy(), dict(request._branches)
    for _ in range(2):
        call.located, call.occurrences = before[0], before[1].copy()
        begin = time.perf_counter()
        plan()
        elapsed = time.perf_counter() - begin
    call.located = True
    call.occurrences, request._calls, request._branches = now
    return elapsed


def reads_of(run: Callable[[], None]) -> int:
    """How many values were read from tensors to plan the calls of ``run``."""
    reads = HostReads()

    def around(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with reads:
                return method(*args)

        return counted

    with watched(around):
        run()
    return reads.count


def measure_way(way: str, regional: bool, videos: int) -> dict[str, Any]:
    small = build("wan")
    # Only a module is enabled where no scheduler is to tell.
    target = small.pipe if way == "scheduler" else small.pipe.transformer
    with svg2_compile.enable(target, regional=regional, **OPTIONS) as enabled:
        WAYS[way](small)
        runs = enabled.report().runs
        assert {run.source for run in runs} == {way}, {run.source for run in runs}
        calls = sorted((run.step, run.branch) for run in runs if "blocks.0" in run.site)
        assert [step for step, _ in calls] == [step for step in range(STEPS) for _ in range(BRANCHES)], calls
        reads = reads_of(lambda: WAYS[way](small))
        seconds: dict[str, list[float]] = {"plan": [], "after": [], "again": []}
        for _ in range(videos):
            for name, values in seconds_by_method(lambda: WAYS[way](small)).items():
                seconds[name] += values
    return {
        "told_by": way,
        "compiled": "each block" if regional else "whole model",
        "plan_us": _microseconds(seconds["plan"]),
        "plan_again_us": _microseconds(seconds["again"]),
        "after_model_call_us": _microseconds(seconds["after"]),
        "values_read_per_model_call": reads / (STEPS * BRANCHES),
    }


def _microseconds(seconds: list[float]) -> dict[str, float]:
    timing = Timing.of_seconds(seconds)
    ordered = sorted(seconds)
    return {
        "median": round(1e3 * timing.median_ms, 1),
        "fastest": round(1e6 * ordered[0], 1),
        "p90": round(1e6 * ordered[int(0.9 * len(ordered))], 1),
        "calls": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer videos, nothing written")
    arguments = parser.parse_args()
    videos = 2 if arguments.quick else 20
    rows = [measure_way(way, regional, videos) for way in WAYS for regional in (False, True)]
    for row in rows:
        print(
            f"{row['told_by']:10} {row['compiled']:12} plan {row['plan_us']['median']:6.1f} us (p90 "
            f"{row['plan_us']['p90']:6.1f}), again {row['plan_again_us']['median']:5.1f} us, after "
            f"{row['after_model_call_us']['median']:5.1f} us, {row['values_read_per_model_call']:.2f} values read"
        )
        if row["told_by"] != "timestep":
            assert row["values_read_per_model_call"] == 0, row
        row["within_limit"] = row["plan_again_us"]["median"] < LIMIT_US
    if not arguments.quick:
        write_results("host_cost", rows, limit_us=LIMIT_US)


if __name__ == "__main__":
    main()
