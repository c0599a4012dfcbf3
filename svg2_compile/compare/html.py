"""The page of a comparison: one file with its styles, script, pictures and numbers inside."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from svg2_compile.compare import charts
from svg2_compile.compare.attention_maps import AttentionMaps
from svg2_compile.compare.density import sparse_steps
from svg2_compile.compare.pair import Pair, decibel
from svg2_compile.compare.pictures import LOG_RANGE, colour, data_uri, frame_strips, map_image, text_colour
from svg2_compile.reporting.groups import grouped_sites

__all__ = ["render"]

MOST_COLUMNS_WITH_NUMBERS = 24
LEGEND_STEPS = 11
UNKNOWN = "-"


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    text: str
    tip: str
    colour: str
    text_colour: str


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells with their headings."""

    name: str
    title: str
    note: str
    column_label: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]

    @property
    def numbers(self) -> bool:
        """Whether there is room for numbers in the cells."""
        return len(self.columns) <= MOST_COLUMNS_WITH_NUMBERS


def render(comparison: Pair) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("svg2_compile.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    strips = frame_strips(comparison.sparse.video, comparison.dense.video)
    frames = {
        "number": strips.frames,
        "dense": strips.dense,
        "sparse": strips.sparse,
        "difference": strips.difference,
        "quality": [_frame_quality(comparison, frame) for frame in strips.frames],
    }
    return environment.get_template("report.html.j2").render(
        c=comparison,
        style=_inline("report.css"),
        script=_inline("report.js"),
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        headline=_headline(comparison),
        strips=strips,
        frames=frames,
        quality_charts=_quality_charts(comparison),
        time_chart=charts.bar_chart("Seconds per step", comparison.dense.step_seconds, comparison.sparse.step_seconds),
        step_charts=[chart for chart in (_density_chart(comparison), _error_chart(comparison)) if chart],
        chart_size=(charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM),
        heat_maps=_heat_maps(comparison),
        legend=[colour(step / (LEGEND_STEPS - 1)) for step in range(LEGEND_STEPS)],
        maps=_maps(comparison.maps),
        sites=grouped_sites(comparison.report.sites),
        notes=_notes(comparison),
    )


def _inline(name: str) -> Any:
    """A file of the package, to be put into the page as it is."""
    from markupsafe import Markup

    folder = files("svg2_compile.compare") / "templates"
    return Markup((folder / name).read_text(encoding="utf-8"))


def _percent(value: float | None, digits: int = 1) -> str:
    return UNKNOWN if value is None else f"{value * 100:.{digits}f} %"


def _headline(c: Pair) -> list[tuple[str, str, str]]:
    """Name, number and what it means."""
    later = c.speedup_of_sparse_steps
    return [
        ("PSNR", decibel(c.psnr), "no value differs" if c.identical else "of the whole video; more is closer"),
        (
            "SSIM",
            UNKNOWN if c.ssim is None else f"{c.ssim:.4f}",
            "frames are too small" if c.ms_ssim is None else f"multi-scale {c.ms_ssim:.4f}; 1 is the same",
        ),
        ("Density", _percent(c.density.mean_sparse), f"where sparse; {_percent(c.density.mean_overall)} overall"),
        ("Speed-up", f"{c.speedup:.2f}x", f"{later:.2f}x in the sparse steps" if later else "no step was sparse"),
    ]


def _notes(c: Pair) -> list[str]:
    """What a reader must know before trusting a number."""
    notes = []
    if c.density.mean_sparse is None:
        notes.append("No attention was sparse, so both videos were computed densely. The decisions below say why.")
    if c.latent:
        notes.append(
            "The pipeline returned latents: frames show their first three channels, and all measures are of latents, "
            "moved to one range, not of pixels."
        )
    return notes


def _frame_quality(c: Pair, frame: int) -> str:
    text = f"PSNR {decibel(c.psnr_per_frame[frame])}"
    return text if c.ssim_per_frame is None else f"{text}, SSIM {c.ssim_per_frame[frame]:.4f}"


def _quality_charts(c: Pair) -> list[charts.Line]:
    lines = [charts.line_chart("PSNR per frame, dB", c.psnr_per_frame, " dB", 1)]
    if c.ssim_per_frame is not None:
        lines.append(charts.line_chart("SSIM per frame", c.ssim_per_frame, "", 4))
    return lines


def _density_chart(c: Pair) -> charts.Line | None:
    percents = [None if density is None else density * 100 for density in c.density.by_step()]
    known = [value for value in percents if value is not None]
    if not known or len(known) < len(percents):
        return None
    return charts.line_chart("Density per step, %", known, " %", 1, "step", from_zero=True)


def _error_chart(c: Pair) -> charts.Line | None:
    errors = c.error_per_step()
    if errors is None:
        return None
    percents = [100 * error for error in errors]
    return charts.line_chart("Measured error of the output per step, %", percents, " %", 2, "step", from_zero=True)


def _heat_maps(c: Pair) -> list[HeatMap]:
    table = c.density
    if not table.layers:
        return []
    steps = [str(step) for step in range(table.num_steps)]
    heads = [str(head) for head in range(table.values.shape[2])]
    number = len(sparse_steps(table))
    return [
        HeatMap(
            *("steps", "By layer and step", "mean over heads and guidance branches", "step", steps),
            rows=_rows(table.layers, table.by_layer_and_step(), "step"),
        ),
        HeatMap(
            *("heads", "By layer and head", f"mean over the {number} sparse steps", "head", heads),
            rows=_rows(table.layers, table.by_layer_and_head(), "head"),
        ),
    ]


def _rows(layers: Sequence[str], values: list[list[float | None]], column: str) -> list[tuple[str, list[Cell]]]:
    rows = []
    for layer, densities in zip(layers, values, strict=True):
        cells = []
        for index, density in enumerate(densities):
            tip = f"{layer}, {column} {index}: {_percent(density)}"
            shade = ("#ffffff", "#12262c") if density is None else (colour(density), text_colour(density))
            cells.append(Cell(UNKNOWN if density is None else f"{density * 100:.0f}", tip, *shade))
        rows.append((layer, cells))
    return rows


def _maps(maps: AttentionMaps | None) -> dict[str, Any] | None:
    if maps is None:
        return None
    panels = [
        ("In token order", "Dense attention: queries from top to bottom, keys from left to right.", maps.original),
        ("Permuted by clusters", "The same weights, tokens of a cluster side by side.", maps.permuted),
        ("Recovered", "What the sparse attention attends to, back in token order.", maps.recovered),
    ]
    low, high = (10**value for value in LOG_RANGE)
    return {
        "facts": maps.facts(),
        "panels": [(title, text, data_uri(map_image(values))) for title, text, values in panels],
        "scale": (f"{low:.2g}x", "1x", f"{high:.2g}x"),
        "side": maps.original.shape[0],
    }
