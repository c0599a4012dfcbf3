"""The whole rewritten attention and its stages against dense attention; what EAR's additions cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.common import Timing
from bench.gpu.context import Context, Prepared, checked_error, sample_rows, times
from bench.rewritten import WARM_ITERS, Rewritten, Settings

__all__ = ["stages"]

DENSITIES = (0.25, 0.125)
EXTRAS = {
    "keys gathered by k_order": Settings(density=0.25, gather_keys=True),
    "compensation": Settings(density=0.25, compensation=True),
    "compensation, error routing": Settings(density=0.25, compensation=True, by_error=True),
    "first order, 10 %": Settings(density=0.1, first_order=True),
}
# What the goal of 2 % of the dense time is about.
BOOKKEEPING = ("order", "permute", "select")


def stages(context: Context, name: str) -> dict[str, Any]:
    """Whole and by stages at both densities, and whole with each extra at 25 %, all taking turns with dense."""
    prepared = context.prepare(name)
    rows = sample_rows(prepared.shape.num_tokens, context.machine.device)
    settings = {f"density {density:.1%}": Settings(density=density) for density in DENSITIES} | EXTRAS
    functions: dict[str, Callable[[], object]] = {"dense": prepared.dense_call}
    variants = {}
    for label, setting in settings.items():
        variant = variants[label] = Rewritten(prepared.shape, prepared.inputs, setting)
        checked_error(label, variant.run()[0][:, rows], variant.exact_rows(rows))
        functions[label] = variant.run
        functions |= {f"{label}/{stage}": function for stage, function in variant.stages.items()}
        if label not in EXTRAS:
            # A graph of its own tensors: the stages above must not write into a graph's memory.
            replayed = Rewritten(prepared.shape, prepared.inputs, setting)
            functions[f"{label}/graph"] = context.machine.captured(replayed.run)
    timings = context.machine.measure(functions, context.repeats)
    dense = timings["dense"]
    return {
        "shape": prepared.shape.name,
        "kmeans_iterations": WARM_ITERS,
        "dense": {"kernel": prepared.dense.name, **times(dense, prepared.shape.flops())},
        "variants": {
            label: _describe(context, prepared, variant, label, timings, dense) for label, variant in variants.items()
        },
    }


def _describe(
    context: Context, prepared: Prepared, variant: Rewritten, label: str, timings: dict[str, Timing], dense: Timing
) -> dict[str, Any]:
    density = float(variant.densities().mean())
    own = {stage: timings[f"{label}/{stage}"] for stage in variant.stages}
    bookkeeping = sum(timing.median_ms for stage, timing in own.items() if stage in BOOKKEEPING)
    described = {
        "density": round(density, 4),
        **times(timings[label]),
        "launch_ms": context.machine.launch_ms(variant.run),
        "host_synchronisations": context.machine.host_synchronisations(variant.run),
        "speedup": round(dense.median_ms / timings[label].median_ms, 3),
        "stages": {stage: times(timing) for stage, timing in own.items()},
        "share_of_dense": {stage: round(timing.median_ms / dense.median_ms, 5) for stage, timing in own.items()},
        "order_permute_select_share_of_dense": round(bookkeeping / dense.median_ms, 5),
        "k_means_tflops": round(_kmeans_flops(prepared) / own["k-means"].median_ms / 1e9, 1),
        "permute_gb_per_s": _permute_rate(prepared, own),
    }
    if f"{label}/graph" in timings:
        graph = timings[f"{label}/graph"]
        described["cuda_graph"] = {**times(graph), "speedup": round(dense.median_ms / graph.median_ms, 3)}
    return described


def _kmeans_flops(prepared: Prepared) -> float:
    """Products of tokens and centroids, queries and keys, all iterations."""
    shape = prepared.shape
    clusters = shape.num_q_clusters + shape.num_k_clusters
    return 2.0 * WARM_ITERS * shape.num_heads * shape.video_tokens * clusters * shape.head_dim


def _permute_rate(prepared: Prepared, own: dict[str, Timing]) -> float | None:
    """Keys and values read and written, in GB/s."""
    if "permute" not in own:
        return None
    shape = prepared.shape
    moved = 4 * shape.num_heads * shape.num_tokens * shape.head_dim * shape.dtype.itemsize
    return round(moved / own["permute"].median_ms / 1e6, 1)
