"""Pictures of the quality of sampled videos: PSNR and SSIM against density, PSNR against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import IMAGES
from bench.plot_style import COLOURS, LINES, MARKERS, METHODS, finish, method_handles, new_figure, save

__all__ = ["plot_psnr_density", "plot_psnr_speed"]


def plot_psnr_density(rows: Sequence[Mapping[str, Any]], folder: Path = IMAGES, note: str = "") -> Path:
    """quality_psnr_density.png: PSNR (mean, one standard deviation) and SSIM against dense, over density.

    rows: {"method": "svg2", "svg2+comp", "tiles+comp" ..., "density", "psnr_mean", "psnr_std", "ssim_mean", ...}.
    note: stands above the curves: what a reader needs to judge them.
    """
    figure, (psnr, ssim) = new_figure(2, 4.8)
    _plot_video_curves(psnr, rows, "density", "psnr_mean", "psnr_std")
    _plot_video_curves(ssim, rows, "density", "ssim_mean", None)
    finish(psnr, "density of the sparse attentions", "PSNR against dense, dB", "PSNR", "x")
    finish(ssim, "density of the sparse attentions", "SSIM against dense", "SSIM", "x")
    return _save_with_legend(figure, rows, folder, "quality_psnr_density", note)


def plot_psnr_speed(rows: Sequence[Mapping[str, Any]], folder: Path = IMAGES, note: str = "") -> Path:
    """quality_psnr_speed.png: PSNR against dense over the speed-up of a step; rows as in ``plot_psnr_density``, with
    "speedup"."""
    figure, axes = new_figure(1, 5.4, 9.0)
    _plot_video_curves(axes, rows, "speedup", "psnr_mean", None)
    axes.axvline(1.0, color="0.7", linewidth=1)
    finish(axes, "a sparse step, times faster than a dense one", "PSNR against dense, dB", "Quality against speed")
    return _save_with_legend(figure, rows, folder, "quality_psnr_speed", note)


def _split_method(method: str) -> tuple[str, str]:
    """Kind of clusters and treatment of "tiles+comp+ear" and the like."""
    name, plus, treatment = method.partition("+")
    if name not in METHODS or plus + treatment not in LINES:
        raise ValueError(f"method is {method!r}; valid: {', '.join(METHODS)}, each with {', '.join(LINES)}")
    return name, plus + treatment


def _plot_video_curves(
    axes: Any, rows: Sequence[Mapping[str, Any]], across: str, what: str, deviation: str | None
) -> None:
    """A line per method, sorted by density, and a thin one with crosses for what top-p selects."""
    for method in dict.fromkeys(row["method"] for row in rows):
        name, treatment = _split_method(method)
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["density"]))
        by_mass = [row for row in mine if row.get("top_p") is not None]
        chosen = [row for row in mine if row.get("top_p") is None]
        if by_mass:
            style = {"color": COLOURS[name], "linestyle": LINES[treatment], "marker": "x", "linewidth": 0.8}
            axes.plot([row[across] for row in by_mass], [row[what] for row in by_mass], **style)
            for row in by_mass:
                text = {"text": f"{method}, top_p {row['top_p']}", "xy": (row[across], row[what])}
                # towards the curves: a mass takes more pairs, and more time, than the budgets shown
                side = {"xytext": (4, -11), "ha": "right"} if across == "density" else {"xytext": (-4, -11)}
                axes.annotate(**text, **side, textcoords="offset points", fontsize=7)
        x, y = np.array([row[across] for row in chosen]), np.array([row[what] for row in chosen])
        axes.plot(x, y, LINES[treatment], color=COLOURS[name], marker=MARKERS[name], markersize=5)
        if deviation is not None and method == "svg2+comp+ear":
            spread = np.array([row[deviation] for row in chosen])
            axes.fill_between(x, y - spread, y + spread, color=COLOURS[name], alpha=0.15, linewidth=0)


def _save_with_legend(figure: Any, rows: Sequence[Mapping[str, Any]], folder: Path, name: str, note: str) -> Path:
    drawn = [_split_method(row["method"]) for row in rows]
    kinds, treatments = ({names[part] for names in drawn} for part in (0, 1))
    handles = method_handles(
        [kind for kind in METHODS if kind in kinds], [treatment for treatment in LINES if treatment in treatments]
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5)
    figure.suptitle(note, fontsize=9)
    return save(figure, folder, name)
