"""The demo's denoising loop: whole-model speed-up over the inner backend alone, and where the time goes.

    python -m bench.e2e_cpu            3,840 and 7,680 tokens; JSON in bench/results/e2e_cpu.json
    python -m bench.e2e_cpu --quick    a small video, nothing written

The model has random weights (see svg2_compile.demo), so speed and density are real and PSNR only says how far the two
loops part. Compilation is not counted: both graphs are compiled before the loop is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import statistics
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from bench.common import write_results
from svg2_compile.api import enable
from svg2_compile.demo import (
    DemoOptions,
    DemoResult,
    demo_inputs,
    demo_model,
    demo_scheduler,
    demo_settings,
    denoise,
    run_demo,
    warm_up,
)


def stage_shares(options: DemoOptions) -> dict[str, float]:
    """Share of the time of sparse steps per operator, from the profiler; "rest" is all that is not attention."""
    model, (noise, prompts) = demo_model(options), demo_inputs(options)
    scheduler = demo_scheduler()
    short = dataclasses.replace(options, steps=3, dense_steps=0)
    settings = {**demo_settings(options), "dense_steps": 0, "inner_backend": options.inner_backend}
    torch._dynamo.reset()
    recorded = profile(activities=[ProfilerActivity.CPU])
    ticks = itertools.count()

    def start_after_first_step() -> None:
        # The first step starts k-means cold; what counts is the course of a video.
        if next(ticks) == 0:
            recorded.start()

    with torch.no_grad(), enable(model, scheduler=scheduler, **settings):
        warm_up(model, scheduler, short, noise, prompts[0])
        denoise(model, scheduler, short, noise, prompts, start_after_first_step)
        recorded.stop()
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {
        event.key.removeprefix("svg2::"): event.cpu_time_total / total
        for event in events
        if event.key.startswith("svg2::")
    }
    return {**{name: round(share, 4) for name, share in shares.items()}, "rest": round(1 - sum(shares.values()), 4)}


def run_case(options: DemoOptions, repeats: int) -> dict[str, Any]:
    """The loop ``repeats`` times; medians of the per-step times of the sparse steps."""
    runs: list[DemoResult] = [run_demo(options, Console(file=io.StringIO())) for _ in range(repeats)]
    sparse = slice(options.dense_steps, None)
    first = runs[0]
    speedups = [run.speedup for run in runs]
    step_speedups = [sum(run.dense.step_seconds[sparse]) / sum(run.sparse.step_seconds[sparse]) for run in runs]
    return {
        "tokens": options.tokens,
        "layers": options.layers,
        "steps": options.steps,
        "dense_steps": options.dense_steps,
        "top_p": options.top_p,
        "inner_backend": options.inner_backend,
        "dense_s": round(statistics.median(run.dense.seconds for run in runs), 2),
        "sparse_s": round(statistics.median(run.sparse.seconds for run in runs), 2),
        "speedup_loop": round(statistics.median(speedups), 2),
        "speedup_sparse_steps": round(statistics.median(step_speedups), 2),
        "spread": round((max(speedups) - min(speedups)) / statistics.median(speedups), 3),
        "mean_density": round(first.report.mean_density or 0.0, 4),
        "psnr_db": round(first.psnr, 1),
        "share_of_sparse_steps": stage_shares(options),
        "dense_step_s": [round(seconds, 3) for seconds in first.dense.step_seconds],
        "sparse_step_s": [round(seconds, 3) for seconds in first.sparse.step_seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small video; writes nothing")
    parser.add_argument("--repeats", type=int, default=3, help="loops per size (default 3)")
    arguments = parser.parse_args()
    sizes = [DemoOptions(frames=4, height=16, width=16, steps=4)] if arguments.quick else []
    if not arguments.quick:
        sizes = [DemoOptions(frames=8), DemoOptions()]
    results = []
    for options in sizes:
        results.append(run_case(options, 1 if arguments.quick else arguments.repeats))
        print(results[-1], flush=True)
    if not arguments.quick:
        print(write_results("e2e_cpu", results))


if __name__ == "__main__":
    main()
