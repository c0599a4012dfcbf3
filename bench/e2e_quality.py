"""The trained model end to end: total time dense and sparse, PSNR, density, and where the time of sparse steps goes.

    python -m bench.e2e_quality            8,192 and 16,384 tokens, 20 steps; JSON in bench/results/e2e_quality.json
    python -m bench.e2e_quality --densities 0.10 0.15    every size at several budgets
    python -m bench.e2e_quality --dense-layers 0.03      with a dense first layer
    python -m bench.e2e_quality --sizes 32x64x64 --steps 8 4 --out e2e_quality_short    short schedules
    python -m bench.e2e_quality --quick    a small video, few steps; writes nothing

A pair as ``svg2 compare`` runs it: same noise, same compiled dense graph, same inner backend (Inductor), no compilation
in the times. A loop's steps are its repetitions: times are given as sums, and as median and spread over the steps.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import Timing, write_results
from bench.minidit.sample import PROMPTS, video_size
from svg2_compile.api import enable
from svg2_compile.compare.density import sparse_steps
from svg2_compile.compare.paired import compare_subject
from svg2_compile.compare.subjects import shipped_subject
from svg2_compile.minidit.model import VideoSize, load_model, make_scheduler, sample_videos

SIZES = (VideoSize(32, 64, 64), VideoSize(16, 128, 128))
PROMPT, SEED, GUIDANCE = PROMPTS[1], 7, 3.0
STAGES = {
    "kmeans": ("kmeans",),
    "selection": (
        "select_blocks",
        "select_blocks_by_error",
        "select_blocks_of_layer",
        "block_estimates",
        "first_order_estimates",
        "cluster_variances",
        "farthest_members",
    ),
    "permutation": ("cluster_order", "permute_tokens", "unpermute_tokens", "cluster_means"),
    "attention": ("block_sparse_attention", "first_order_attention", "first_order_terms"),
    "statistics": ("block_density",),
}
"""Operators by what they are part of; everything else is "rest": projections, feed-forward, cross-attention ..."""


def stage_shares(size: VideoSize, options: dict[str, Any]) -> dict[str, float]:
    """Share of the time of sparse steps by stage, from the profiler, over two steps after the cold start."""
    torch._dynamo.reset()
    model, scheduler = load_model(), make_scheduler(size.tokens)
    recorded = profile(activities=[ProfilerActivity.CPU])
    ticks = itertools.count()

    def start_after_first_step(_: int) -> None:
        if next(ticks) == 0:
            recorded.start()

    with enable(model, scheduler=scheduler, **{**options, "dense_steps": 0, "min_tokens": 0}):
        sample_videos(model, [PROMPT], [SEED], size, 3, GUIDANCE, scheduler, start_after_first_step)
        recorded.stop()
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = {event.key.removeprefix("svg2::"): event.cpu_time_total for event in events if "svg2::" in event.key}
    shares = {stage: sum(spent.get(name, 0.0) for name in names) / total for stage, names in STAGES.items()}
    return {name: round(share, 4) for name, share in {**shares, "rest": 1 - sum(shares.values())}.items()}


def run_case(size: VideoSize, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """One size: the pair of loops, and the profile."""
    subject = shipped_subject(PROMPT, SEED, (size.frames, size.height, size.width), steps, GUIDANCE)
    pair = compare_subject(subject, **options)
    sparse = sparse_steps(pair.density)
    if not sparse:
        raise RuntimeError("no attention became sparse: there is nothing to compare")
    cold, *warm = sparse
    density, speedup = pair.density.mean_sparse, pair.speedup_of_sparse_steps
    assert density is not None and speedup is not None and pair.ssim is not None
    return {
        "tokens": size.tokens,
        "video": [size.frames, size.height, size.width],
        "steps": steps,
        "guidance": GUIDANCE,
        "dense_steps": cold,
        **{name: pair.settings[name] for name in ("compensation", "routing", "budget", "dense_layers")},
        **options,
        "density": round(density, 4),
        "psnr_db": round(pair.psnr, 2),
        "ssim": round(pair.ssim, 4),
        "dense_s": round(pair.dense.seconds, 1),
        "sparse_s": round(pair.sparse.seconds, 1),
        "speedup": round(pair.speedup, 3),
        "speedup_sparse_steps": round(speedup, 3),
        "dense_step": Timing.of_seconds(pair.dense.step_seconds).to_json(),
        "sparse_step": Timing.of_seconds(pair.sparse.step_seconds[step] for step in warm).to_json(),
        "cold_start_step_s": round(pair.sparse.step_seconds[cold], 2),
        "share_of_sparse_steps": stage_shares(size, options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small video, few steps; writes nothing")
    parser.add_argument("--sizes", type=video_size, nargs="+", default=SIZES, metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--steps", type=int, nargs="+", default=(20,))
    parser.add_argument("--out", default="e2e_quality", help="name of the result file in bench/results")
    budgets = "fixed budgets instead of the default selection"
    parser.add_argument("--densities", type=float, nargs="+", default=(None,), metavar="DENSITY", help=budgets)
    layers = "a fraction of the layers; default: svg2's"
    parser.add_argument("--dense-layers", type=float, default=None, metavar="SHARE", help=layers)
    arguments = parser.parse_args()
    sizes = (VideoSize(8, 48, 48),) if arguments.quick else arguments.sizes
    results = []
    schedules = (6,) if arguments.quick else arguments.steps
    for size, steps, density in itertools.product(sizes, schedules, arguments.densities):
        given = {"density": density, "dense_layers": arguments.dense_layers}
        options = {name: value for name, value in given.items() if value is not None}
        results.append(run_case(size, steps, options))
        print(results[-1], flush=True)
    if not arguments.quick:
        print(write_results(arguments.out, results))


if __name__ == "__main__":
    main()
