"""How pictures of benchmarks look.

In those of quality a colour is a kind of clusters, a line style what becomes of skipped blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "LINES", "MARKERS", "METHODS", "NAMES", "finish", "method_handles", "new_figure", "save"]

# The palette of Okabe and Ito, distinct for colour-blind readers.
COLOURS = {"svg2": "#0072B2", "tiles": "#D55E00", "raster": "#CC79A7", "tokens": "#000000"}
MARKERS = {"svg2": "o", "tiles": "s", "raster": "^", "tokens": ""}
LINES = {"": ":", "+comp": "--", "+comp+ear": "-", "+first_order": "-."}
NAMES = {
    "svg2": "clusters by meaning (SVG2)",
    "tiles": "blocks by position, 3-D tiles",
    "raster": "blocks by position, runs of tokens",
}
TREATMENTS = {
    "": "skipped blocks dropped",
    "+comp": "+ compensation",
    "+comp+ear": "+ compensation + error routing",
    "+first_order": "first order, one budget for all heads",
}
METHODS = ("svg2", "tiles", "raster")


def new_figure(columns: int, height: float = 4.4, width: float = 5.8) -> tuple[Any, Any]:
    """A figure with ``columns`` axes, each ``width`` x ``height`` inches."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def save(figure: Any, folder: Path, name: str) -> Path:
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def finish(axes: Any, xlabel: str, ylabel: str, title: str, percent: str = "") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    if "x" in percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if "y" in percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def method_handles(
    methods: Sequence[str] = METHODS, treatments: Sequence[str] = ("", "+comp", "+comp+ear")
) -> list[Any]:
    """Entries of a legend: a row of colours, a row of line styles."""
    from matplotlib.lines import Line2D

    colours = [Line2D([], [], color=COLOURS[name], marker=MARKERS[name], label=NAMES[name]) for name in methods]
    styles = [Line2D([], [], color="0.3", linestyle=LINES[key], label=TREATMENTS[key]) for key in treatments]
    # Legends are filled column by column.
    return [handle for pair in itertools.zip_longest(colours, styles) for handle in pair if handle is not None]
