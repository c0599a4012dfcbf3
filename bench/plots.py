"""Plots of benchmark results; needs matplotlib (the extra "plots")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import IMAGES
from bench.plot_style import finish, new_figure, save

FLEX = "#009E73"
VARIANTS = {"svg2": ("#0072B2", "SVG2"), "default": ("#D55E00", "default, first order")}


def plot_cpu_attention(results: Sequence[Mapping[str, Any]], folder: Path = IMAGES) -> Path:
    """cpu_attention.png: time over the number of tokens, and speed-up over density at 16k tokens."""
    chosen = [r for r in results if r["dtype"] == "float32" and r["head_dim"] == 64]
    figure, (scaling, density) = new_figure(2)
    rows = sorted((r for r in chosen if r["requested_density"] == 0.25), key=lambda r: int(r["num_tokens"]))
    tokens = [r["num_tokens"] for r in rows]
    scaling.plot(tokens, [r["dense"]["median_ms"] / r["num_heads"] for r in rows], "k-o", label="dense")
    for name, (colour, label) in VARIANTS.items():
        times = [r[name]["everything"]["median_ms"] / r["num_heads"] for r in rows]
        scaling.plot(tokens, times, "-o", color=colour, label=label)
    scaling.plot(
        tokens, [r["flex"]["median_ms"] / r["num_heads"] for r in rows], "-s", color=FLEX, label="FlexAttention"
    )
    scaling.set(xscale="log", yscale="log")
    scaling.set_xticks(tokens, [f"{count:,}" for count in tokens])
    scaling.minorticks_off()
    scaling.legend()
    finish(scaling, "tokens", "milliseconds per head", "density 25 %, everything included")

    rows = sorted((r for r in chosen if r["num_tokens"] == 16384), key=lambda r: float(r["requested_density"]))
    limits = [r["svg2"]["density"] for r in rows]
    density.plot(limits, [1 / limit for limit in limits], "k--", label="limit: 1 / density")
    for name, (colour, label) in VARIANTS.items():
        achieved = [r[name]["density"] for r in rows]
        for what, style in (("attention", ":"), ("everything", "-")):
            speedups = [r[name][f"speedup_{what}"] for r in rows]
            density.plot(achieved, speedups, style, marker="o", color=colour, label=f"{label}: {what}")
    peers = [r for r in rows if "flex" in r]
    at = [r["requested_density"] for r in peers]
    density.plot(at, [r["flex"]["speedup"] for r in peers], "-s", color=FLEX, label="FlexAttention, no clusters")
    density.set(xscale="log", yscale="log")
    density.set_xticks(at + [1.0], [f"{share:.0%}" for share in (*at, 1.0)])
    density.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
    density.minorticks_off()
    density.legend(fontsize=8)
    finish(density, "density", "times faster than dense", "16,384 tokens")
    figure.suptitle("Rewritten attention on a CPU, float32, head_dim 64")
    return save(figure, folder, "cpu_attention")
