"""Many videos, one at a time and resumable: a line of JSON for each, in a file outside the repository.

    python -m bench.quality.campaign rows.jsonl            sample what is missing in the file, most telling first
    python -m bench.quality.campaign rows.jsonl --write    bench/results/quality_first_order.json from the lines there

Points of which the result file has more prompts than the lines keep what it says.

Paired as in ``bench.quality.video``: same noise, same dense kernel, same inner backend. The dense videos lie beside the
file, with what the model answered in the dense steps that all methods begin with: those are computed once. Stop it
whenever you like; it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import RESULTS, write_results
from bench.minidit.sample import PROMPTS
from bench.quality.methods import GLOBAL_SLOPE, METHODS, PARTS
from bench.quality.results import (
    BEFORE,
    FIRST,
    FIRST_ORDER,
    NO_MEMBERS,
    PUBLISHED_DENSE_LAYERS,
    dense_layers_of,
    read_results,
)
from bench.quality.video import Remembered, Setting, gate, sample, sample_sparse
from svg2_compile.compare.metrics import multiscale_ssim, psnr, ssim
from svg2_compile.minidit.model import VideoSize, load_model
from svg2_compile.runtime.dense_rules import dense_step_count

SIZE, GUIDANCE, STEPS = VideoSize(16, 64, 64), 3.0, 20
ALL = {method.name: method for method in (*METHODS, GLOBAL_SLOPE, *PARTS)}
OTHERS = ("svg2", "global slope", "tiles+first_order")
FIRST_SEED = 100
POINT = ("method", "requested_density", "steps", "dense_layers", "dense_last_steps")
"""What tells one point of the results from another; each has a row per prompt."""


@dataclass(frozen=True)
class Sample:
    """One sparse video: method, density, prompt's number, how many steps, and which layers and steps are dense.

    dense_layers: None is what the method is shown with.
    """

    method: str
    density: float | str  # or a schedule
    prompt: int
    steps: int = STEPS
    dense_layers: float | None = None
    dense_last_steps: int = 0

    def __post_init__(self) -> None:
        if self.dense_layers is None:
            object.__setattr__(self, "dense_layers", dense_layers_of(self.method))

    @property
    def setting(self) -> Setting:
        dense = {"dense_layers": self.dense_layers, "dense_last_steps": self.dense_last_steps}
        return Setting(SIZE, self.steps, GUIDANCE, **dense)  # type: ignore[arg-type]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.method, self.density, self.prompt, self.steps, self.dense_layers, self.dense_last_steps


def planned(prompts: Sequence[int]) -> Iterator[Sample]:
    """All samples, in an order in which every prefix already says something."""

    def of(points: Sequence[tuple[str, float | str]], **setting: Any) -> Iterator[Sample]:
        for prompt in prompts:
            for method, density in points:
                yield Sample(method, density, prompt, **setting)

    yield from of([(FIRST, 0.10), (BEFORE, 0.25), (BEFORE, 0.10)])
    yield from of([(FIRST, 0.25), (FIRST, 0.15), (FIRST, 0.05)])
    yield from of([(method, 0.10) for method in OTHERS])
    for steps in (8, 4):
        yield from of([(FIRST, 0.10), (BEFORE, 0.25)], steps=steps)
    yield from of([(FIRST, 0.10)], dense_layers=PUBLISHED_DENSE_LAYERS)
    yield from of([(FIRST, 0.10)], dense_last_steps=1)
    yield from of([(FIRST, "0.15..0.05"), (FIRST, "0.05..0.15")])
    yield from of([(method.name, 0.10) for method in PARTS], dense_layers=PUBLISHED_DENSE_LAYERS)
    yield from of([(NO_MEMBERS, density) for density in (0.10, 0.25, 0.05, 0.15)])
    yield from of([(method, 0.25) for method in OTHERS])
    yield from of([(BEFORE, 0.15), (BEFORE, 0.05)])
    yield from of([(method, density) for method in OTHERS for density in (0.05, 0.15)])
    yield from of([(method.name, 0.25) for method in PARTS], dense_layers=PUBLISHED_DENSE_LAYERS)


def flicker(video: Tensor, dense: Tensor) -> float:
    """Mean absolute difference between the changes from frame to frame of two videos [3, F, H, W]."""
    return float((video.diff(dim=1) - dense.diff(dim=1)).abs().mean())


@dataclass(frozen=True)
class Dense:
    """The dense video of a prompt and a number of steps, and the model's answers in its first, dense steps."""

    video: Tensor
    first: list[Tensor]


def measure(model: nn.Module, item: Sample, dense: Dense) -> dict[str, Any]:
    """Sample one video and compare it with the dense one."""
    began = time.perf_counter()
    job = (PROMPTS[item.prompt], FIRST_SEED + item.prompt)
    selection: dict[str, Any] = {"density": item.density}
    (done,) = sample_sparse(model, [job], item.setting, ALL[item.method], selection, [dense.first])
    return {
        "method": item.method,
        "requested_density": item.density,
        "prompt": item.prompt,
        "steps": item.steps,
        "dense_layers": item.dense_layers,
        "dense_last_steps": item.dense_last_steps,
        "density": round(done.density, 4),
        "density_overall": round(done.density_overall, 4),
        "psnr": round(psnr(done.video, dense.video), 3),
        "ssim": round(ssim(done.video, dense.video), 4),
        "ms_ssim": round(multiscale_ssim(done.video, dense.video), 4),
        "flicker": round(flicker(done.video, dense.video), 5),
        "seconds": round(time.perf_counter() - began, 1),
    }


def dense_video(model: nn.Module, item: Sample, folder: Path) -> Dense:
    """What is dense of a sample's prompt and number of steps; made once."""
    path = folder / f"dense_{item.prompt}_{item.steps}.pt"
    if not path.exists():
        first: list[Tensor] = []
        calls = 2 * dense_step_count(item.setting.dense_steps, item.steps)  # with and without the prompt
        made = sample(Remembered(model, first, calls), PROMPTS[item.prompt], FIRST_SEED + item.prompt, item.setting)
        torch.save({"video": made.video, "first": first}, path)
    return Dense(**torch.load(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(path: Path, prompts: Sequence[int]) -> None:
    """Sample what the file does not have."""
    model = load_model()
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("method", "requested_density", "prompt", *POINT[2:])
    done = {tuple(row[key] for key in keys) for row in read_rows(path)}
    for item in planned(prompts):
        if item.key not in done:
            row = measure(model, item, dense_video(model, item, path.parent))
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per point over its prompts: mean, deviation and each prompt's value, in the order of the file."""
    points: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        points[tuple(row[key] for key in POINT)].append(row)
    results = []
    for point, found in points.items():
        found = sorted(found, key=lambda row: int(row["prompt"]))
        result: dict[str, Any] = dict(zip(POINT, point, strict=True))
        result["prompts"] = [row["prompt"] for row in found]
        result["density"] = round(statistics.fmean(row["density"] for row in found), 4)
        for what, digits in (("psnr", 2), ("ssim", 4), ("ms_ssim", 4), ("flicker", 5), ("seconds", 1)):
            values = [float(row[what]) for row in found]
            result[f"{what}_mean"] = round(statistics.fmean(values), digits)
            result[f"{what}_std"] = round(statistics.stdev(values), digits) if len(values) > 1 else 0.0
        results.append(result | {f"{what}_per_prompt": [row[what] for row in found] for what in ("psnr", "flicker")})
    return results


def merged(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of two summaries, each from the one that has more prompts of it."""
    points = {tuple(row[key] for key in POINT): row for row in ({"dense_last_steps": 0, **row} for row in old)}
    for row in new:
        before = points.get(tuple(row[key] for key in POINT))
        if before is None or len(before["prompts"]) <= len(row["prompts"]):
            points[tuple(row[key] for key in POINT)] = row
    return list(points.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the file of JSON lines")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(range(len(PROMPTS))), metavar="N")
    parser.add_argument("--write", action="store_true", help="sample nothing; write the result file")
    arguments = parser.parse_args()
    if not arguments.write:
        with contextlib.suppress(KeyboardInterrupt):
            run(arguments.rows, arguments.prompts)
        return
    jobs = [(prompt, FIRST_SEED + index) for index, prompt in enumerate(PROMPTS)]
    error = gate(jobs, Setting(VideoSize(8, 32, 32), STEPS, GUIDANCE), ALL[FIRST])
    size = {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width, "tokens": SIZE.tokens}
    described = {**size, "guidance": GUIDANCE, "dense_steps": 0.2, "jobs": jobs, "gate_error": error}
    before = read_results(RESULTS, FIRST_ORDER) or {"results": []}
    # What an earlier campaign measured says where, for as long as it is kept.
    old = [{"environment": before["environment"], **row} for row in before["results"]]
    print(write_results(FIRST_ORDER, merged(summary(read_rows(arguments.rows)), old), **described))


if __name__ == "__main__":
    main()
