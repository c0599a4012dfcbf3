"""A picture of the results: where the time of the rewritten attention goes, and how efficient the kernels are.

python -m bench.gpu.plots                       from bench/results/, for every device that was measured
python -m bench.gpu.plots --results DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.common import IMAGES, RESULTS
from bench.plot_style import new_figure, save

__all__ = ["plot_device"]

STAGES = ("k-means", "order", "permute", "means", "select", "attend")
DENSITIES = ("density 25.0%", "density 12.5%")


def _measured(path: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
    return [result for result in results if result["status"] == "measured"]


def plot_device(slug: str, results: Path, out: Path) -> Path:
    """Draw <out>/gpu_<slug>.png from <results>/<slug>-stages.json and <slug>-attention.json."""
    figure, (left, right) = new_figure(2)
    _plot_stages(left, _measured(results / f"{slug}-stages.json"))
    _plot_efficiency(right, _measured(results / f"{slug}-attention.json"))
    figure.suptitle(f"Rewritten attention on {slug.upper()}")
    return save(figure, out, f"gpu_{slug}")


def _plot_stages(axes: Any, records: list[dict[str, Any]]) -> None:
    """One bar per shape and density: the stages' times over dense attention's, stacked."""
    bars = [(record["shape"], label, record["variants"][label]) for record in records for label in DENSITIES]
    names = [f"{shape}\n{label.removeprefix('density ')}" for shape, label, _ in bars]
    base = [0.0] * len(bars)
    for stage in STAGES:
        heights = [variant["share_of_dense"].get(stage, 0.0) for *_, variant in bars]
        axes.bar(range(len(bars)), heights, bottom=base, label=stage)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, (height, (*_, variant)) in enumerate(zip(base, bars, strict=True)):
        axes.text(place, height, f"{variant['speedup']:.2f}x", ha="center", va="bottom")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(bars)), names, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("time / dense time")
    axes.legend(fontsize=8)


def _plot_efficiency(axes: Any, records: list[dict[str, Any]]) -> None:
    """(density x dense time) / time of the attention kernel and of the other libraries at 25 %."""
    bars = []
    for record in records:
        if "variants" in record:
            bars.append((f"svg2\n{record['shape']['name']}", record["variants"]["density 25 %"]["efficiency"]))
        elif "peer" in record:
            bars.append((f"{record['peer'].split()[0].strip(',')}\n{record['shape']['name']}", record["efficiency"]))
    bars.sort(key=lambda bar: bar[0].split("\n")[::-1])
    axes.bar(range(len(bars)), [value for _, value in bars])
    axes.axhline(0.85, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("(density x dense time) / time, at 25 %")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.plots")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    slugs = sorted(path.name.removesuffix("-stages.json") for path in options.results.glob("*-stages.json"))
    if not slugs:
        print(f"no results of a GPU in {options.results}")
    for slug in slugs:
        print(plot_device(slug, options.results, options.out))


if __name__ == "__main__":
    main()
