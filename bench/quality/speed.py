"""Speed of a denoising step at points whose quality is known: dense and sparse steps side by side.

    python -m bench.quality.video --videos 1 --size 32x64x64 --out quality_video_long    the quality of every point
    python -m bench.quality.speed            its speed (about 13 minutes); quality_video_speed.json
    python -m bench.quality.speed --quick    one round of one point, a small video; writes nothing

In the minutes that a whole loop takes, a shared machine changes its speed by more than methods differ. So every point
is timed over short videos, the sparse steps of each against the dense ones just before them, and rounds take turns.
The inner backend is "eager", as where the quality was measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from bench.common import RESULTS, Timing, write_results
from bench.minidit.sample import PROMPTS
from bench.quality.methods import METHODS, Method
from bench.quality.results import LONG, SPEED, read_results
from bench.quality.video import Point, Setting, gate, made_sparse, sample
from svg2_compile.minidit.model import VideoSize, load_model

__all__ = ["StepTimes", "points_of", "speed_row", "time_steps"]

DENSE_STEPS, STEPS = 3, 7
"""The first dense and the first sparse step compile; the others are timed."""


class StepTimes(NamedTuple):
    """Seconds of the dense and of the sparse steps of one short video."""

    dense: list[float]
    sparse: list[float]

    @property
    def speedup(self) -> float:
        return statistics.median(self.dense) / statistics.median(self.sparse)


def time_steps(model: nn.Module, setting: Setting, point: Point) -> StepTimes:
    """One short video of a point."""
    with made_sparse(model, setting, point) as (_, scheduler):
        seconds = sample(model, PROMPTS[0], 100, setting, scheduler).step_seconds
    return StepTimes(seconds[1:DENSE_STEPS], seconds[DENSE_STEPS + 1 :])


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Point]]:
    """The rows of a quality run that had a budget, each with its method and budget. Budgets end with a whole block, a
    little above what was asked for."""
    methods: dict[str, Method] = {method.name: method for method in METHODS}
    return [
        (row, (methods[row["method"]], {"density": round(row["density"], 2)})) for row in rows if "top_p" not in row
    ]


def speed_row(quality: Mapping[str, Any], rounds: Sequence[StepTimes]) -> dict[str, Any]:
    """Quality and speed of a point: the median over rounds of the speed-up of a step, and the range from the fastest
    sparse against the slowest dense step to the reverse."""
    dense, sparse = ([seconds for times in rounds for seconds in times[kind]] for kind in (0, 1))
    what = ("method", "density", "psnr_mean", "ssim_mean", "ms_ssim_mean")
    return {
        **{name: quality[name] for name in what},
        "dense_step": Timing.of_seconds(dense).to_json(),
        "sparse_step": Timing.of_seconds(sparse).to_json(),
        "speedup": round(statistics.median(times.speedup for times in rounds), 3),
        "speedup_range": [round(min(dense) / max(sparse), 3), round(max(dense) / min(sparse), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one point, a small video; writes nothing")
    parser.add_argument("--rounds", type=int, default=1, help="short videos of every point (default 1)")
    arguments = parser.parse_args()
    quality = read_results(RESULTS, LONG)
    if quality is None:
        raise SystemExit(f"no {LONG}.json in {RESULTS}; bench.quality.video --out {LONG} makes it")
    chosen = points_of(quality["results"])[: 1 if arguments.quick else None]
    size = VideoSize(8, 32, 32) if arguments.quick else VideoSize(*(quality[k] for k in ("frames", "height", "width")))
    setting = Setting(size, STEPS, quality["guidance"], dense_steps=DENSE_STEPS)
    error = gate([(PROMPTS[0], 100)], Setting(VideoSize(8, 32, 32), STEPS, quality["guidance"]))
    model, times = load_model(), defaultdict(list)
    for _ in range(1 if arguments.quick else arguments.rounds):
        for index, (_, point) in enumerate(chosen):
            times[index].append(time_steps(model, setting, point))
            print(point[0].name, point[1], times[index][-1], flush=True)
    results = [speed_row(row, times[index]) for index, (row, _) in enumerate(chosen)]
    if not arguments.quick:
        described = {name: quality[name] for name in ("frames", "height", "width", "tokens", "steps", "jobs")}
        print(
            write_results(SPEED, results, **described, gate_error=error, quality_from=quality["environment"]["commit"])
        )


if __name__ == "__main__":
    main()
