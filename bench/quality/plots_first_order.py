"""Pictures of first-order compensation: PSNR over density, and the error of queries over their distance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import IMAGES
from bench.plot_style import finish, new_figure, save
from bench.quality.tables_first_order import SHOWN, shown_rows

__all__ = ["plot_first_order", "plot_queries"]

# Okabe and Ito, as everywhere.
COLOURS = dict(zip(SHOWN, ("#56B4E9", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00"), strict=True))
STAND_INS = {
    "centroid": ("#0072B2", "the mean key and value (SVG-EAR)"),
    "A + B": ("#E69F00", "exact mass and residual (A + B)"),
    "A + B + J": ("#D55E00", "and the slope (A + B + J)"),
}


def plot_first_order(document: Mapping[str, Any], folder: Path = IMAGES) -> Path:
    """quality_first_order.png: PSNR of whole videos over density, a line per method."""
    figure, axes = new_figure(1, 5.4, 7.4)
    for method, label in SHOWN.items():
        rows = list(shown_rows(document, method).values())
        if not rows:
            continue  # not measured yet
        rows.sort(key=lambda row: float(row["density"]))
        x, y = (np.array([row[key] for row in rows]) for key in ("density", "psnr_mean"))
        axes.plot(x, y, color=COLOURS[method], marker="o", markersize=4, label=label)
        spread = np.array([row["psnr_std"] for row in rows])
        axes.fill_between(x, y - spread, y + spread, color=COLOURS[method], alpha=0.12, linewidth=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.set_xticks([0.05, 0.10, 0.15, 0.20, 0.25])
    finish(axes, "density of the sparse attentions", "PSNR against dense, dB", "Whole videos", "x")
    return save(figure, folder, "quality_first_order")


def plot_queries(document: Mapping[str, Any], folder: Path = IMAGES) -> Path:
    """quality_one_query.png: the error of the output as queries move away from their cluster's centroid."""
    queries, drawn = document["queries"], document["drawn"]
    figure, axes = new_figure(1, 4.2, 7.4)
    for name, (colour, label) in STAND_INS.items():
        axes.plot(queries["distance"], queries[name], "-o", markersize=4, color=colour, label=label)
    axes.axvline(1.0, color="0.7", linewidth=1)
    axes.legend(fontsize=8)
    title = f"Layer {drawn['layer']}, step {drawn['step']}, {drawn['density']:.0%} of the pairs selected"
    finish(axes, "from the cluster's centroid (0) to the query (1) and beyond", "output error, relative", title)
    return save(figure, folder, "quality_one_query")
