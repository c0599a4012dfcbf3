"""One k-means iteration, ours and flash-kmeans', on the same tokens from the same centroids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import Timing
from bench.gpu.context import Context, Prepared
from bench.gpu.peers import NotMeasured, flash_kmeans
from svg2_compile.kernels import ops

__all__ = ["kmeans"]

FEW, MANY = 2, 6  # an iteration is the difference of two runs: what is done once per call does not count
SAMPLED_TOKENS = 512


def kmeans(context: Context, name: str) -> dict[str, Any]:
    """Time per iteration for the queries' and the keys' number of clusters."""
    prepared = context.prepare(name)
    shape = prepared.shape
    sides = {
        "query": (prepared.inputs.query, prepared.inputs.q_centroids),
        "key": (prepared.inputs.key, prepared.inputs.k_centroids),
    }
    results = {}
    for side, (tokens, centroids) in sides.items():
        x = tokens[:, :, : shape.video_tokens].contiguous()
        results[side] = _compare(context, prepared, x, centroids)
    return {"shape": shape.name, "iterations_differ": MANY - FEW, "sides": results}


def _compare(context: Context, prepared: Prepared, x: Tensor, centroids: Tensor) -> dict[str, Any]:
    warm = torch.full((), True, dtype=torch.bool, device=x.device)

    def ours(iters: int) -> Tensor:
        return ops.kmeans(x, centroids, warm, iters)[0][0]

    runs: dict[str, Callable[[int], Tensor]] = {"ours": ours}
    missing = None
    try:
        runs["flash-kmeans"] = flash_kmeans(x, centroids)
    except NotMeasured as reason:
        missing = str(reason)
    worst = {label: _check(label, x, centroids, run(1)) for label, run in runs.items()}
    functions = {f"{label}/{count}": _bind(run, count) for label, run in runs.items() for count in (FEW, MANY)}
    timings = context.machine.measure(functions, context.repeats)
    flops = 2.0 * x.shape[1] * x.shape[2] * centroids.shape[2] * x.shape[3]
    described: dict[str, Any] = {
        label: {**_iteration(timings, label, flops), "extra_distance": worst[label]} for label in runs
    }
    if missing is None:
        ratio = described["flash-kmeans"]["iteration_ms"] / described["ours"]["iteration_ms"]
        described["speedup_over_flash_kmeans"] = round(ratio, 3)
    else:
        described["flash-kmeans"] = {"not_measured": missing}
    return {"clusters": centroids.shape[2], **described}


def _bind(run: Callable[[int], Tensor], iters: int) -> Callable[[], object]:
    return lambda: run(iters)


def _iteration(timings: dict[str, Timing], label: str, flops: float) -> dict[str, Any]:
    many, few = timings[f"{label}/{MANY}"], timings[f"{label}/{FEW}"]
    per_iteration = (many.median_ms - few.median_ms) / (MANY - FEW)
    return {
        "iteration_ms": round(per_iteration, 4),
        "tflops": round(flops / max(per_iteration, 1e-6) / 1e9, 1),
        f"{MANY}_iterations": dict(many.to_json()),
    }


def _check(label: str, x: Tensor, centroids: Tensor, labels: Tensor) -> float:
    """Largest squared distance to the chosen centroid beyond that to the nearest, relative; on sampled tokens.

    Raises AssertionError where a choice is worse than rounding the tokens' products can explain.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(x.shape[2], generator=generator)[:SAMPLED_TOKENS].to(x.device)
    distances = torch.cdist(x[0][:, rows].float(), centroids[0]).square()
    chosen = distances.gather(-1, labels[:, rows].long().unsqueeze(-1)).squeeze(-1)
    nearest = distances.amin(dim=-1)
    extra = float(((chosen - nearest) / nearest.clamp(min=1e-6)).max())
    if not extra <= 0.05:
        raise AssertionError(f"k-means of {label}: a label's squared distance is {extra:.1%} above the nearest")
    return float(f"{extra:.2e}")
