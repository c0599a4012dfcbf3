"""Pictures of the measured quality, from the JSON files in bench/results.

    python -m bench.quality.plots    docs/img/quality_*.png of every result file that is there

Here the attention level (quality_attention.json): recall, output error, the centroid cache; plots_video.py has the
video level (quality_video.json, quality_video_speed.json).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import IMAGES, RESULTS
from bench.plot_style import COLOURS, LINES, MARKERS, METHODS, NAMES, finish, method_handles, new_figure, save
from bench.quality.measure import VARIANTS, average
from bench.quality.plots_first_order import plot_first_order, plot_queries
from bench.quality.plots_video import plot_psnr_density, plot_psnr_speed
from bench.quality.results import ATTENTION, FIRST_ORDER, FIRST_ORDER_LAYERS, SPEED, VIDEO, read_results

__all__ = ["plot_errors", "plot_recall", "plot_reuse"]

CARRIED_COLOURS = {0: "#E69F00", 1: "#56B4E9", 2: "#0072B2", 5: "#009E73"}


def oracle_note(document: Mapping[str, Any]) -> str:
    """How concentrated the attention is that the curves belong to: the oracle's token recall over the layers."""
    parts = []
    for density in ("10%", "25%"):
        recalls = [row[f"recall at {density}"]["oracle_tokens"] for row in document["summary"] if row["layer"] != "all"]
        parts.append(f"{min(recalls):.0%} to {max(recalls):.0%} at {density}")
    return f"best keys of every query hold, by layer, {' and '.join(parts)} of the attention"


def speed_note(document: Mapping[str, Any]) -> str:
    """What a speed-up was measured on."""
    where = document["environment"]
    device = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}"
    return f"{document['tokens']:,} tokens, {document['steps']} steps, {device}"


def _about(document: Mapping[str, Any]) -> str:
    return (
        f"small trained model, {document['tokens']:,} tokens, {document['num_q_clusters']} query and "
        f"{document['num_k_clusters']} key clusters\n{oracle_note(document)}"
    )


# ------------------------------------------------------------------------------------------------------ attention level
def plot_recall(document: Mapping[str, Any], folder: Path = IMAGES) -> Path:
    """quality_recall.png: recall over density; how concentrated the attention is; and recall layer by layer."""
    figure, (curves, concentration, layers) = new_figure(3)
    recall = average([result["recall"] for result in document["results"]])
    tokens = recall["tokens"]
    curves.plot(tokens["density"], tokens["recall"], "-", color="black", label="best keys of every query (bound)")
    for name in METHODS:
        chosen, known = recall[name]["density"], recall[name]["oracle"]
        style = {"color": COLOURS[name], "markersize": 5}
        curves.plot(chosen["density"], chosen["recall"], "-", marker=MARKERS[name], label=NAMES[name], **style)
        curves.plot(known["density"], known["recall"], ":", **style)
    by_mass = recall["svg2"]["top_p"]
    curves.plot(by_mass["density"], by_mass["recall"], "x", color=COLOURS["svg2"], label="SVG2 by top-p")
    curves.plot([], [], ":", color="0.3", label="dotted: the best of the same blocks")
    curves.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="blocks at random")
    finish(curves, "density", "attention recall", "Recall, mean over layers and steps", "xy")
    curves.set(xlim=(0, 0.55), ylim=(0, 1.3))  # room for the legend
    curves.set_yticks(np.linspace(0, 1, 6))
    curves.legend(fontsize=7.5, loc="upper left", ncols=2)
    _plot_concentration(concentration, document["results"])
    _plot_layers(layers, document["summary"])
    figure.suptitle(_about(document))
    return save(figure, folder, "quality_recall")


def _plot_concentration(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """The oracle's token recall of every layer."""
    from matplotlib import colormaps

    layers = sorted({result["layer"] for result in results})
    for layer in layers:
        curve = average([result["recall"]["tokens"] for result in results if result["layer"] == layer])
        colour = colormaps["viridis"](0.95 * layer / max(1, layers[-1]))
        axes.plot(curve["density"], curve["recall"], "-", marker=".", color=colour, label=f"layer {layer}")
    for density in (0.10, 0.25):
        axes.axvline(density, color="0.7", linewidth=1, zorder=0)
    finish(axes, "keys per query", "attention recall", "How concentrated attention is: best keys of every query", "xy")
    axes.set(xlim=(0, 0.55), ylim=(0, 1))
    axes.legend(fontsize=7.5, loc="lower right", ncols=2)


def _plot_layers(axes: Any, summary: Sequence[Mapping[str, Any]]) -> None:
    """Recall at a density of 25 %, layer by layer."""
    rows = [row for row in summary if row["layer"] != "all"]
    places = [row["layer"] for row in rows]
    for name, key in (("tokens", "oracle_tokens"), *((name, name) for name in METHODS)):
        values = [row["recall at 25%"][key] for row in rows]
        label = "best keys of every query (bound)" if name == "tokens" else NAMES[name]
        axes.plot(places, values, "-", marker=MARKERS[name] or ".", color=COLOURS[name], label=label, markersize=6)
    axes.axhline(0.25, color="0.7", linewidth=1)
    finish(axes, "layer", "attention recall", "Recall at 25 % density, layer by layer", "y")
    axes.set(ylim=(0, 1.2))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xticks(places)
    axes.legend(fontsize=7.5, loc="upper right", ncols=2)


def plot_errors(document: Mapping[str, Any], folder: Path = IMAGES) -> Path:
    """quality_error.png: relative output error over density for every variant, and layer by layer at 25 %."""
    figure, (curves, layers) = new_figure(2, 4.8)
    errors = average([result["error"] for result in document["results"]])
    for name in METHODS:
        for treatment in VARIANTS:
            line, curve = LINES[treatment], errors[name + treatment]
            style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4}
            curves.plot(curve["density"], curve["error"], line, **style)
    finish(curves, "density", "output error, relative to dense", "Mean over layers and steps", "x")
    curves.set(yscale="log", xlim=(0, 0.55))
    rows = [row for row in document["summary"] if row["layer"] != "all"]
    places = [row["layer"] for row in rows]
    for name in METHODS:
        for treatment in VARIANTS:
            line = LINES[treatment]
            values = [row["error at 25%"][name + treatment] for row in rows]
            layers.plot(places, values, line, color=COLOURS[name], marker=MARKERS[name], markersize=4)
    finish(layers, "layer", "output error, relative to dense", "At 25 % density, layer by layer")
    layers.set(yscale="log")
    layers.set_xticks(places)
    for axes in (curves, layers):
        _plain_log_ticks(axes)
    figure.legend(handles=method_handles(), loc="outside lower center", ncols=3, fontsize=8.5)
    figure.suptitle(_about(document))
    return save(figure, folder, "quality_error")


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axes.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_reuse(document: Mapping[str, Any], folder: Path = IMAGES) -> Path:
    """quality_reuse.png: recall over the age of carried centroids, and over k-means iterations per step."""
    figure, (ages, iterations) = new_figure(2)
    rows = document["reuse"]
    for iters, colour in CARRIED_COLOURS.items():
        chosen = sorted((r["age"], r["recall_fixed"]) for r in rows if r["start"] == "carried" and r["iters"] == iters)
        label = "carried, labels kept" if iters == 0 else f"carried, {iters} iteration{'s' * (iters > 1)} per step"
        ages.plot(*zip(*chosen, strict=True), "-o", color=colour, label=label, markersize=5)
    for iters, line in ((50, "-"), (2, "--"), (1, ":")):
        chosen = sorted((r["age"], r["recall_fixed"]) for r in rows if r["start"] == "cold" and r["iters"] == iters)
        label = f"cold every step, {iters} iteration{'s' * (iters > 1)}"
        ages.plot(*zip(*chosen, strict=True), line, color="black", label=label)
    finish(ages, "steps since the cold start", "recall at 25 % density", "Centroids carried from step to step", "y")
    lowest, highest = ages.get_ylim()
    ages.set_ylim(lowest - 0.5 * (highest - lowest), highest)  # room for the legend
    ages.legend(fontsize=7.5, loc="lower center", ncols=2)
    _plot_iterations(iterations, rows)
    _whole_percent(ages)
    figure.suptitle(_about(document))
    return save(figure, folder, "quality_reuse")


def _whole_percent(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    # Ticks between whole percents would be labelled as two neighbours of the same name.
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))


def _plot_iterations(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Recall at a fixed density, and the density that top-p takes, over iterations: mean over steps after the first."""
    for start, colour, marker in (("carried", COLOURS["svg2"], "o"), ("cold", "black", "s")):
        counts = sorted({row["iters"] for row in rows if row["start"] == start})
        label = "from the step before" if start == "carried" else "cold every step"
        for what, line, meaning in (
            ("recall_fixed", "-", "recall at 25 %"),
            ("density_top_p", ":", "density at top-p 0.9"),
        ):
            values = [_later_mean(rows, start, iters, what) for iters in counts]
            axes.plot(counts, values, line, marker=marker, color=colour, label=f"{meaning}, {label}", markersize=5)
    axes.set_xscale("symlog", linthresh=1)
    ticks = sorted({row["iters"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    finish(axes, "k-means iterations per step", "recall, or density", "What an iteration is worth", "y")
    axes.legend(fontsize=7.5)
    _whole_percent(axes)


def _later_mean(rows: Sequence[Mapping[str, Any]], start: str, iters: int, what: str) -> float:
    later = [row for row in rows if (row["start"], row["iters"]) == (start, iters) and row["age"] > 0]
    return float(np.mean([row[what] for row in later]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.plots")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    drawn, note = [], ""
    attention, video, speed = (read_results(options.results, name) for name in (ATTENTION, VIDEO, SPEED))
    if attention is not None:
        note = oracle_note(attention)
        drawn += [plot(attention, options.out) for plot in (plot_recall, plot_errors, plot_reuse)]
    if video is not None:
        drawn.append(plot_psnr_density(video["results"], options.out, note))
    if speed is not None:
        drawn.append(plot_psnr_speed(speed["results"], options.out, "\n".join([speed_note(speed), note]).strip()))
    for name, plot in ((FIRST_ORDER, plot_first_order), (FIRST_ORDER_LAYERS, plot_queries)):
        document = read_results(options.results, name)
        if document is not None:
            drawn.append(plot(document, options.out))
    for path in drawn:
        print(path)
    if not drawn:
        print(f"none of {ATTENTION}, {VIDEO}, {SPEED} in {options.results}")


if __name__ == "__main__":
    main()
