"""Quality of sampled videos: PSNR and SSIM against density, every method on the same prompts and seeds.

    python -m bench.quality.video --processes 2              JSON in bench/results/quality_video.json
    python -m bench.quality.video --videos 1 --size 32x64x64 --out quality_video_long    what bench.quality.speed times
    python -m bench.quality.video --quick                    one prompt, one density, a small video; writes nothing

Paired: a sparse video and the dense one that it is compared with start from the same noise, run the same dense kernel
and the same inner backend ("eager": what is compared is the attention, not the compiler around it), in float32. The
first steps and layers are dense as published (20 % and 3 %). "density" is that of the sparse attentions;
"density_overall" counts the dense steps and layers as well. With ``--processes 2`` two points are measured at once,
each with half of the threads.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import require_close, write_results
from bench.minidit.sample import PROMPTS, video_size
from bench.quality.methods import METHODS, Method
from bench.quality.results import VIDEO
from svg2_compile.api import Enabled, enable
from svg2_compile.compare.density import density_table
from svg2_compile.compare.metrics import multiscale_ssim, psnr, ssim
from svg2_compile.compare.pair import Run
from svg2_compile.minidit.model import VideoSize, load_model, make_scheduler, sample_videos

DENSITIES = (0.10, 0.15, 0.25, 0.40)
TOP_P = (0.8, 0.9)
BY_MASS = ("svg2", "svg2+comp+ear")
"""Methods that are also measured as users run them: by the mass that the selection reaches, not by a budget."""


Job = tuple[str, int]
"""A prompt and a seed."""
Point = tuple[Method, dict[str, float]]
"""A method at a selection: a budget or a mass."""


@dataclass(frozen=True)
class Setting:
    """How videos are sampled; the same for the dense and every sparse one."""

    size: VideoSize
    steps: int
    guidance: float
    dense_steps: float = 0.2
    dense_layers: float = 0.03
    dense_last_steps: int = 0
    num_q_clusters: int | None = None

    def options(self) -> dict[str, Any]:
        return {
            "num_q_clusters": self.num_q_clusters,
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "dense_last_steps": self.dense_last_steps,
            "min_tokens": 0,
            "inner_backend": "eager",
        }


@dataclass(frozen=True)
class Sampled(Run):
    """A run, and the mean density of its attentions."""

    density: float = 1.0
    density_overall: float = 1.0


class Remembered(nn.Module):
    """A model that answers its first calls from ``first``, and keeps there what it answers until ``calls`` are kept.

    The dense steps at the start are the same for every method: they need not be computed for each.
    """

    def __init__(self, model: nn.Module, first: list[Tensor], calls: int = 0) -> None:
        super().__init__()
        self.model, self.first, self.calls = model, first, calls
        self.made = 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        self.made += 1
        if self.made <= len(self.first):
            return (self.first[self.made - 1],)
        answer: tuple[Tensor, ...] = self.model(*args, **kwargs)
        if len(self.first) < self.calls:
            self.first.append(answer[0])
        return answer


def sample(model: nn.Module, prompt: str, seed: int, setting: Setting, scheduler: Any = None) -> Sampled:
    """One video of the model as it is: dense, or enabled by the caller."""
    ends = [time.perf_counter()]
    (video,) = sample_videos(
        *(model, [prompt], [seed], setting.size, setting.steps, setting.guidance),
        scheduler=scheduler,
        after_step=lambda _: ends.append(time.perf_counter()),
    )
    return Sampled(video, [end - begin for begin, end in itertools.pairwise(ends)])


@contextlib.contextmanager
def made_sparse(model: nn.Module, setting: Setting, point: Point) -> Iterator[tuple[Enabled, Any]]:
    """Within it the model runs as the point says. Yields the enabled model and the scheduler that tells its steps."""
    method, selection = point
    # A graph per selection would otherwise add up to Dynamo's limit of recompilations.
    torch._dynamo.reset()
    scheduler = make_scheduler(setting.size.tokens)
    options = {**setting.options(), **method.options, **selection}
    with method.clusters(setting.size), enable(model, scheduler=scheduler, **options) as enabled:
        yield enabled, scheduler


def sample_sparse(
    model: nn.Module,
    jobs: Sequence[Job],
    setting: Setting,
    method: Method,
    selection: dict[str, float],
    first: Sequence[list[Tensor]] | None = None,
) -> list[Sampled]:
    """The videos of all (prompt, seed) by one method at one selection.

    first: for each job what the model answers in its dense steps at the start, if that is known.
    """
    sampled = []
    with made_sparse(model, setting, (method, selection)) as (enabled, scheduler):
        for index, (prompt, seed) in enumerate(jobs):
            enabled.reset()
            enabled.session.history.clear()
            called = Remembered(model, first[index]) if first else model
            done = sample(called, prompt, seed, setting, scheduler)
            table = density_table(enabled.report(), setting.steps)
            if table.mean_sparse is None or table.mean_overall is None:
                raise RuntimeError(f"{method.name} {selection}: no attention became sparse")
            sampled.append(Sampled(done.video, done.step_seconds, table.mean_sparse, table.mean_overall))
    return sampled


def row(method: Method, selection: dict[str, float], dense: list[Sampled], sparse: list[Sampled]) -> dict[str, Any]:
    """Means and spreads over the videos of one point of a curve."""
    psnrs = [psnr(mine.video, theirs.video) for mine, theirs in zip(sparse, dense, strict=True)]
    ssims = [ssim(mine.video, theirs.video) for mine, theirs in zip(sparse, dense, strict=True)]
    multiscale = [multiscale_ssim(mine.video, theirs.video) for mine, theirs in zip(sparse, dense, strict=True)]
    return {
        "method": method.name,
        **selection,
        "density": round(statistics.fmean(s.density for s in sparse), 4),
        "density_overall": round(statistics.fmean(s.density_overall for s in sparse), 4),
        **_spread("psnr", psnrs, 2),
        **_spread("ssim", ssims, 4),
        **_spread("ms_ssim", multiscale, 4),
        "psnr_per_video": [round(value, 2) for value in psnrs],
    }


def _spread(name: str, values: list[float], digits: int) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{name}_mean": round(statistics.fmean(values), digits), f"{name}_std": round(deviation, digits)}


def gate(jobs: Sequence[Job], setting: Setting, method: Method = METHODS[0]) -> float:
    """With every cluster kept, the sparse video must be the dense one. Returns the largest difference."""
    model = _model()
    short = Setting(setting.size, 3, setting.guidance, dense_steps=0, dense_layers=0)
    (sparse,) = sample_sparse(model, jobs[:1], short, method, {"density": 1.0})
    return require_close("all clusters kept", sparse.video, sample(model, *jobs[0], short).video, 1e-3)


@functools.cache
def _model() -> nn.Module:
    return load_model()


def _dense(setting: Setting, job: Job) -> Sampled:
    return sample(_model(), *job, setting)


def _sparse(setting: Setting, jobs: Sequence[Job], point: Point) -> list[Sampled]:
    return sample_sparse(_model(), jobs, setting, *point)


def measure(
    setting: Setting, jobs: Sequence[Job], chosen: Sequence[Point], processes: int
) -> tuple[float, list[dict[str, Any]]]:
    """The largest error of the gate, and a row per point, printed as it is done."""
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        error = pool.submit(gate, jobs, setting).result()
        dense = list(pool.map(functools.partial(_dense, setting), jobs))
        for point, sparse in zip(chosen, pool.map(functools.partial(_sparse, setting, jobs), chosen), strict=True):
            rows.append(row(*point, dense, sparse))
            print(rows[-1], flush=True)
    return error, rows


def points(methods: Sequence[Method], densities: Sequence[float], top_ps: Sequence[float]) -> list[Point]:
    """Every point of every curve."""
    by_budget: list[Point] = [(method, {"density": density}) for density in densities for method in methods]
    return by_budget + [(method, {"top_p": top_p}) for method in methods if method.name in BY_MASS for top_p in top_ps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt, one density, a small video; writes nothing")
    parser.add_argument("--size", type=video_size, default=VideoSize(16, 64, 64), metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--videos", type=int, default=4, help="prompts, each with a seed of its own (default 4)")
    names = [method.name for method in METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, metavar="DENSITY")
    parser.add_argument("--top-p", type=float, nargs="*", default=TOP_P, metavar="TOP_P")
    parser.add_argument("--query-clusters", type=int, metavar="N", help="not the default number of query clusters")
    parser.add_argument("--processes", type=int, default=1, help="points that are measured at once (default 1)")
    parser.add_argument("--out", default=VIDEO, help="name of the result file in bench/results")
    arguments = parser.parse_args()
    size = VideoSize(8, 32, 32) if arguments.quick else arguments.size
    steps = 6 if arguments.quick else arguments.steps
    setting = Setting(size, steps, arguments.guidance, num_q_clusters=arguments.query_clusters)
    count = 1 if arguments.quick else arguments.videos
    jobs = [(PROMPTS[index % len(PROMPTS)], 100 + index) for index in range(count)]
    methods = [method for method in METHODS if method.name in arguments.methods]
    chosen = ((0.25,), ()) if arguments.quick else (arguments.densities, arguments.top_p)
    error, rows = measure(setting, jobs, points(methods, *chosen), arguments.processes)
    if not arguments.quick:
        described = {"frames": size.frames, "height": size.height, "width": size.width, "tokens": size.tokens}
        print(
            write_results(
                arguments.out,
                rows,
                **{**described, "steps": setting.steps, "guidance": setting.guidance},
                **{"dense_steps": setting.dense_steps, "dense_layers": setting.dense_layers, "gate_error": error},
                num_q_clusters=setting.num_q_clusters or "default",
                jobs=jobs,
                processes=arguments.processes,
            )
        )


if __name__ == "__main__":
    main()
