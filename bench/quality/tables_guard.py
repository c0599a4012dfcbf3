"""The table about densities that follow a target, from what bench.quality.guard wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.common import markdown

__all__ = ["guard_table"]


def guard_table(document: Mapping[str, Any]) -> str:
    """Every video with its target, and the steps and layers of the first."""
    header = ["target", "prompt", "density", "error / target", "measured / error", "above twice the target", "PSNR, dB"]
    rows = [
        [
            f"{video['target']:g}",
            str(video["prompt"]),
            f"{video['density']:.1%}",
            f"{video['error_over_target_geometric']:.2f} x/÷ {video['spread_of_error_factor']:.2f}",
            f"{video['measured_over_error_geometric']:.2f} x/÷ {video['spread_of_measured_factor']:.2f}",
            f"{video['above_twice_target']:.1%}",
            f"{video['psnr']:.1f}",
        ]
        for video in document["results"]
    ]
    first = document["results"][0]
    about = f"The video of target {first['target']:g}, prompt {first['prompt']}"
    return "\n\n".join(
        [
            markdown(header, rows),
            f"**{about}, by step**",
            _by("step", first["rows"]),
            "**The same by layer**, from the fourth sparse step on",
            _by("layer", [row for row in first["rows"] if row["step"] >= first["rows"][0]["step"] + 3]),
        ]
    )


def _by(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean density, measured error and error, a column for each value of ``key``."""
    values = list(dict.fromkeys(row[key] for row in rows))
    names = [str(value).removeprefix("blocks.").removesuffix(".attn1") for value in values]
    lines = []
    for what, form in (("density", "{:.1%}"), ("measured", "{:.4f}"), ("error", "{:.4f}")):
        means = [statistics.fmean(row[what] for row in rows if row[key] == value) for value in values]
        label = {"density": "density", "measured": "error, measured", "error": "error of all rows"}[what]
        lines.append([label, *(form.format(mean) for mean in means)])
    return markdown([key, *names], lines)
