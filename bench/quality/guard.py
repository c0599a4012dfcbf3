"""Does the density follow the target, and do a few rows know the error? Whole videos with target_error.

    python -m bench.quality.guard --prompts 0 1 --targets 0.02 0.01 0.005      bench/results/quality_guard.json

Of every sparse attention: the density it had, the error that its few rows gave, and the error of all its rows, which
needs the dense attention. PSNR and mean density stand beside the videos of one density (``bench.quality.campaign``).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import write_results
from bench.minidit.sample import PROMPTS
from bench.quality.campaign import FIRST_SEED, GUIDANCE, SIZE, STEPS, flicker
from bench.quality.implementations import implementation
from bench.quality.results import GUARD
from bench.quality.video import Setting, sample
from svg2_compile.api import enable
from svg2_compile.compare.metrics import psnr
from svg2_compile.kernels.cpu import implementation as cpu
from svg2_compile.minidit.model import load_model, make_scheduler

_true_errors: ContextVar[list[float] | None] = ContextVar("bench_true_errors", default=None)


def __getattr__(name: str) -> Any:
    """Every other operator is the CPU's."""
    return getattr(cpu, name)


def sampled_error(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The CPU's; the error of all rows is noted on the way."""
    noted = _true_errors.get()
    if noted is not None:
        noted.append(float(cpu.sampled_error(*(*arguments[:-1], arguments[0].shape[2]))[1]))
    return cpu.sampled_error(*arguments)


@contextmanager
def true_errors() -> Iterator[list[float]]:
    """Inside, the error of all rows of every attention that is measured goes into the list."""
    found: list[float] = []
    token = _true_errors.set(found)
    try:
        with implementation("guard", __name__):
            yield found
    finally:
        _true_errors.reset(token)


def measure(model: nn.Module, prompt: int, target: float, dense: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """One video that follows a target."""
    torch._dynamo.reset()
    setting = Setting(SIZE, STEPS, GUIDANCE)
    scheduler = make_scheduler(SIZE.tokens)
    options = {**setting.options(), "target_error": target, **options}
    with true_errors() as found, enable(model, scheduler=scheduler, **options) as enabled:
        done = sample(model, PROMPTS[prompt], FIRST_SEED + prompt, setting, scheduler)
        report = enabled.report()
    runs = [run for run in report.runs if run.graph == "sparse"]
    rows: list[dict[str, Any]] = [
        {
            "layer": run.site,
            "step": run.step,
            "branch": run.context,
            "asked": run.density_asked,
            "density": run.density,
            "measured": run.error,
            "error": error,
        }
        for run, error in zip(runs, found, strict=True)
    ]
    return {
        "prompt": prompt,
        "target": target,
        **{name: value for name, value in options.items() if name not in setting.options()},
        "psnr": round(psnr(done.video, dense), 2),
        "flicker": round(flicker(done.video, dense), 5),
        "density": round(statistics.fmean(row["density"] for row in rows), 4),
        "notes": report.notes,
        **summary(rows, target),
        "rows": [{name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()} for row in rows],
    }


def summary(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """Of the steps after the third sparse one: by then the density has come where it belongs."""
    begin = min(row["step"] for row in rows) + 3
    settled = [row for row in rows if row["step"] >= begin and row["asked"] < 1 and row["measured"] > 0]
    logs = [math.log(row["error"] / target) for row in settled if row["error"] > 0]
    deviation = [math.log(row["measured"] / row["error"]) for row in settled if row["error"] > 0]
    return {
        "error_mean": round(statistics.fmean(row["error"] for row in settled), 5),
        "error_over_target_geometric": round(math.exp(statistics.fmean(logs)), 3),
        "spread_of_error_factor": round(math.exp(statistics.stdev(logs)), 3),
        "measured_over_error_geometric": round(math.exp(statistics.fmean(deviation)), 3),
        "spread_of_measured_factor": round(math.exp(statistics.stdev(deviation)), 3),
        "above_twice_target": round(statistics.fmean(row["error"] > 2 * target for row in settled), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.02, 0.01, 0.005])
    parser.add_argument("--out", default=GUARD, help="name of the result file in bench/results")
    arguments = parser.parse_args()
    model, results = load_model(), []
    for prompt in arguments.prompts:
        dense = sample(model, PROMPTS[prompt], FIRST_SEED + prompt, Setting(SIZE, STEPS, GUIDANCE)).video
        for target in arguments.targets:
            results.append(measure(model, prompt, target, dense, {}))
            print({name: value for name, value in results[-1].items() if name != "rows"}, flush=True)
            described = {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width, "tokens": SIZE.tokens}
            write_results(arguments.out, results, **described, steps=STEPS, guidance=GUIDANCE)


if __name__ == "__main__":
    main()
