"""Quality of the sparse attention itself, on the attentions of the trained small model while it samples.

    python -m bench.quality.attention            JSON in bench/results/quality_attention.json (about ten minutes)
    python -m bench.quality.attention --quick    one prompt and step, a small video; writes nothing

Recall and output error against density, layer by layer, for clusters by meaning ("svg2") and blocks by position
("raster", "tiles") of equal count; the oracle that knows the attention; statistics of clusters; and what carrying
centroids from step to step is worth. docs/quality.md says what each means. Clusters are made as the compiled model
makes them: cold at the first sparse step, then a few iterations per step from the centroids of the one before.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.common import write_results
from bench.minidit.sample import PROMPTS, video_size
from bench.quality.capture import Attention, watch_attention
from bench.quality.clusters import Clustering, cluster, cluster_by_position
from bench.quality.counts import CountStudy
from bench.quality.measure import (
    average,
    cluster_statistics,
    error_curves,
    interpolate,
    recall_curves,
    require_exact,
)
from bench.quality.position import KINDS
from bench.quality.results import ATTENTION
from bench.quality.reuse import ReuseStudy
from bench.quality.routing import RoutingStudy
from svg2_compile.explanation import explain
from svg2_compile.minidit.model import CONFIG, VideoSize, initial_noise, load_model, with_coordinates
from svg2_compile.minidit.prompts import encode_prompt
from svg2_compile.settings.config import Svg2Config

RECALL_DENSITIES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.35, 0.50)
ERROR_DENSITIES = (0.05, 0.10, 0.15, 0.25, 0.35, 0.50)
SUMMARY_DENSITIES = (0.10, 0.15, 0.25)
GUIDANCE = 3.0


@dataclass(frozen=True)
class Setting:
    """What is sampled and where it is measured. ``reuse_steps``: over how many steps centroids are followed."""

    size: VideoSize
    prompts: tuple[str, ...]
    sampling_steps: int
    steps: tuple[int, ...]
    reuse_steps: int

    @property
    def first_sparse_step(self) -> int:
        return math.ceil(float(Svg2Config().dense_steps) * self.sampling_steps - 1e-9)


def default_cluster_counts(size: VideoSize) -> tuple[int, int]:
    """Clusters of queries and keys that the compiler chooses for the model at this size: asked, not computed."""
    from diffusers import WanTransformer3DModel

    layer = WanTransformer3DModel(**{**CONFIG, "num_layers": 1}).eval().requires_grad_(False)
    inputs = (with_coordinates(initial_noise(0, size)), torch.tensor([500.0]), encode_prompt(None).unsqueeze(0))
    report = explain(layer, *inputs, options={"min_tokens": 0, "dense_layers": 0}, return_dict=False)
    site = next(site for site in report.sites if site.decision == "sparse")
    return int(site.num_q_clusters or 0), int(site.num_k_clusters or 0)


class Measurement:
    """Collects what every watched attention shows, per layer and step, over prompts."""

    def __init__(self, setting: Setting, counts: tuple[int, int]) -> None:
        self.setting, self.counts, self.config = setting, counts, Svg2Config()
        self.grid = (setting.size.frames, setting.size.height // 4, setting.size.width // 4)
        self.gate: float | None = None
        self.reuse: ReuseStudy | None = ReuseStudy(counts)
        self.more_clusters: CountStudy | None = CountStudy(counts)
        self.routing: RoutingStudy | None = RoutingStudy()
        self._measured: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self._carried: dict[int, Clustering] = {}

    def add(self, attention: Attention) -> None:
        """Carry the centroids to this step; measure, if the step is one that is measured."""
        before = self._carried.get(attention.layer)
        iters = self.config.init_iters if before is None else self.config.step_iters
        semantic = cluster(attention, self.counts, iters, before)
        self._carried[attention.layer] = semantic
        if self.reuse is not None and attention.step < self.setting.first_sparse_step + self.setting.reuse_steps:
            self.reuse.add(attention)
        if attention.step in self.setting.steps:
            self._measure(attention, semantic)
        in_the_middle = attention.step == self.setting.steps[len(self.setting.steps) // 2]
        if self.more_clusters is not None and in_the_middle:
            self.more_clusters.add(attention)
        if self.routing is not None and in_the_middle:
            self.routing.add(attention, semantic)

    def _measure(self, attention: Attention, semantic: Clustering) -> None:
        clusterings = {"svg2": semantic}
        for kind in KINDS:
            clusterings[kind] = cluster_by_position(attention, self.counts, kind, self.grid)
        if self.gate is None:
            self.gate = require_exact(attention, clusterings)
        self._measured[attention.layer, attention.step].append(
            {
                "recall": recall_curves(attention, clusterings, RECALL_DENSITIES),
                "error": error_curves(attention, clusterings, ERROR_DENSITIES),
                "clusters": cluster_statistics(attention, clusterings),
            }
        )

    def next_video(self) -> None:
        """Centroids are dropped with the video, as in a compiled model; only the first one is studied more closely."""
        self._carried.clear()
        self.reuse = self.more_clusters = self.routing = None

    def results(self) -> list[dict[str, Any]]:
        """One entry per layer and step: the means over prompts."""
        return [
            {"layer": layer, "step": step, **average(measured)}
            for (layer, step), measured in sorted(self._measured.items())
        ]


def run(model: nn.Module, setting: Setting) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure everything: an entry per layer and step, and what belongs beside them in the JSON."""
    counts = default_cluster_counts(setting.size)
    measurement = Measurement(setting, counts)
    reuse, more_clusters, routing = measurement.reuse, measurement.more_clusters, measurement.routing
    watched = range(setting.first_sparse_step, max(setting.steps) + 1)
    for seed, prompt in enumerate(setting.prompts):
        began = time.perf_counter()
        sampling = (setting.size, setting.sampling_steps, GUIDANCE)
        watch_attention(model, prompt, seed, *sampling, watched, measurement.add)
        measurement.next_video()
        print(f"{prompt}: {time.perf_counter() - began:.0f} s", flush=True)
    results = measurement.results()
    about = {
        "size": f"{setting.size.frames}x{setting.size.height}x{setting.size.width}",
        "tokens": setting.size.tokens,
        "num_q_clusters": counts[0],
        "num_k_clusters": counts[1],
        "prompts": list(setting.prompts),
        "sampling_steps": setting.sampling_steps,
        "guidance": GUIDANCE,
        "largest_error_all_blocks": measurement.gate,
        "summary": summarise(results),
        "reuse": reuse.results() if reuse is not None else [],
        "more_clusters": more_clusters.results() if more_clusters is not None else [],
        "routing": routing.results() if routing is not None else [],
    }
    return results, about


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per layer, and for all together, recall and error at a few densities exactly, averaged over steps."""
    by_layer: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_layer[result["layer"]].append(result)
    return [_summary(layer, chosen) for layer, chosen in [*by_layer.items(), ("all", results)]]


def _summary(layer: int | str, results: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"layer": layer}
    curves = average([result["recall"] for result in results])
    for density in SUMMARY_DENSITIES:
        row = {"oracle_tokens": interpolate(curves["tokens"], "recall", density)}
        for name in ("svg2", *KINDS):
            row[name] = interpolate(curves[name]["density"], "recall", density)
            row[f"{name} oracle"] = interpolate(curves[name]["oracle"], "recall", density)
        summary[f"recall at {density:.0%}"] = row
    errors = average([result["error"] for result in results])
    for density in SUMMARY_DENSITIES:
        row = {name: interpolate(curve, "error", density) for name, curve in errors.items()}
        summary[f"error at {density:.0%}"] = row
    return summary


def print_summary(summary: list[dict[str, Any]]) -> None:
    for what in [key for key in summary[0] if key != "layer"]:
        print(f"\n{what}\n{'layer':>13} " + " ".join(f"{row['layer']:>6}" for row in summary))
        for name in summary[0][what]:
            print(f"{name:>13} " + " ".join(f"{row[what][name]:6.3f}" for row in summary))


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.attention")
    parser.add_argument("--quick", action="store_true", help="one prompt and step, a small video; writes nothing")
    parser.add_argument("--size", type=video_size, default=VideoSize(16, 64, 64), metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--prompts", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--sampling-steps", type=int, default=20, help="denoising steps of a video (default 20)")
    parser.add_argument("--steps", type=int, nargs="+", help="denoising steps at which to measure (default 5 9 14 18)")
    parser.add_argument(
        "--reuse-steps", type=int, default=8, help="steps over which centroids are followed (default 8)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default=ATTENTION, help="name of the result file in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = options.sampling_steps
    steps = options.steps or [round(share * count) for share in (0.25, 0.46, 0.7, 0.92)]
    setting = Setting(options.size, PROMPTS[: options.prompts], count, tuple(steps), options.reuse_steps)
    if options.quick:
        setting = Setting(VideoSize(8, 48, 48), PROMPTS[:1], 8, (3,), 2)
    results, about = run(load_model(), setting)
    print_summary(about["summary"])
    if not options.quick:
        print(write_results(options.out, rounded(results), **rounded(about)))


if __name__ == "__main__":
    main()
