"""Plots of benchmark results; needs matplotlib (the extra "plots")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import IMAGES


def plot_cpu_attention(results: Sequence[Mapping[str, Any]]) -> Path:
    """docs/img/cpu_attention.png: time over the number of tokens, and speed-up over density at 16k tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in results if r["dtype"] == "float32" and r["head_dim"] == 64]
    figure, (scaling, density) = plt.subplots(1, 2, figsize=(11, 4.2))

    def per_head_ms(result: Mapping[str, Any], what: str) -> float:
        return float(result[what]["median_ms"]) / float(result["num_heads"])

    for requested, colour in ((0.25, "tab:blue"), (0.125, "tab:green")):
        rows = sorted((r for r in chosen if r["requested_density"] == requested), key=lambda r: int(r["num_tokens"]))
        tokens = [r["num_tokens"] for r in rows]
        if requested == 0.25:
            scaling.plot(tokens, [per_head_ms(r, "dense") for r in rows], "k-o", label="dense")
        times = [per_head_ms(r, "everything") for r in rows]
        scaling.plot(tokens, times, "-o", color=colour, label=f"rewritten, density {requested:.1%}")
    scaling.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds per head")
    scaling.set_title("float32, head_dim 64, everything included")
    scaling.legend()
    scaling.grid(alpha=0.3, which="both")

    rows = sorted((r for r in chosen if r["num_tokens"] == 16384), key=lambda r: float(r["density"]))
    achieved = [r["density"] for r in rows]
    density.plot(achieved, [1 / d for d in achieved], "k--", label="limit: 1 / density")
    density.plot(achieved, [r["speedup_attention"] for r in rows], "-o", label="attention alone")
    density.plot(achieved, [r["speedup_everything"] for r in rows], "-o", label="everything")
    density.set(xscale="log", yscale="log", xlabel="density", ylabel="times faster than dense")
    density.set_title("float32, head_dim 64, 16,384 tokens")
    density.legend()
    density.grid(alpha=0.3, which="both")
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / "cpu_attention.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
