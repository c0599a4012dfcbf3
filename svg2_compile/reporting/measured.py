"""What ran, by step and by layer: density asked and got, its spread over heads, and the measured error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from svg2_compile.reporting.records import SiteRecord

__all__ = ["Summary", "by_layer", "by_step", "layers_table", "steps_table"]

MOST_ROWS = 10


@dataclass(frozen=True)
class Summary:
    """Some sparse calls together. Numbers are None where they were not collected.

    name: the step, "4" or "4-6", or the path of an attention. asked: mean of the density that was to be met. density:
    mean of what was selected. least, most: mean density of the head with the least and with the most, of any attention.
    error: mean of the measured errors, worst: the largest of them.
    """

    name: str
    calls: int
    asked: float | None
    density: float | None
    least: float | None
    most: float | None
    error: float | None
    worst: float | None


def by_step(runs: Sequence[SiteRecord], most: int | None = None) -> list[Summary]:
    """A summary of every step with sparse calls; of runs of steps, where there are more than ``most``."""
    steps = sorted({run.step for run in runs if run.graph == "sparse"})
    width = 1 if most is None else -(-len(steps) // most) or 1
    groups = [steps[first : first + width] for first in range(0, len(steps), width)]
    names = [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    return [
        _summary(name, [run for run in runs if run.graph == "sparse" and run.step in group])
        for name, group in zip(names, groups, strict=True)
    ]


def by_layer(runs: Sequence[SiteRecord]) -> list[Summary]:
    """A summary of every attention with sparse calls, in the order in which they were met."""
    sites = dict.fromkeys(run.site for run in runs if run.graph == "sparse")
    return [_summary(site, [run for run in runs if run.graph == "sparse" and run.site == site]) for site in sites]


def _summary(name: str, runs: Sequence[SiteRecord]) -> Summary:
    heads = [_mean_of_heads(of_site) for of_site in _by(runs, lambda run: run.site)]
    flat = [density for densities in heads for density in densities]
    errors = [run.error for run in runs if run.error is not None]
    return Summary(
        name=name,
        calls=len(runs),
        asked=_mean(run.density_asked for run in runs),
        density=_mean(run.density for run in runs),
        least=min(flat, default=None),
        most=max(flat, default=None),
        error=_mean(errors),
        worst=max(errors, default=None),
    )


def _by(runs: Sequence[SiteRecord], key: Callable[[SiteRecord], str]) -> Iterable[list[SiteRecord]]:
    groups: dict[str, list[SiteRecord]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups.values()


def _mean_of_heads(runs: Sequence[SiteRecord]) -> list[float]:
    """The mean density of every head of one attention, over batch items and calls."""
    rows = [row for run in runs for row in run.density_per_head or ()]
    return [statistics.fmean(head) for head in zip(*rows, strict=True)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def steps_table(runs: Sequence[SiteRecord]) -> Table | None:
    """Density and error over the steps, in at most MOST_ROWS rows; None where nothing changes nor was measured."""
    rows = by_step(runs, MOST_ROWS)
    if all(row.error is None for row in rows) and len({row.asked for row in rows}) < 2:
        return None
    return _table("step", rows, "sparse steps of the last video")


def layers_table(runs: Sequence[SiteRecord]) -> Table | None:
    """Density by head and error of the attentions, those of the largest error first; None without sparse calls."""
    rows = by_layer(runs)
    if not rows:
        return None
    if any(row.error is not None for row in rows):
        rows.sort(key=lambda row: row.error or 0.0, reverse=True)
    left_out = len(rows) - MOST_ROWS
    title = "sparse attentions of the last video" + (f", {MOST_ROWS} of {len(rows)}" if left_out > 0 else "")
    return _table("attention", rows[:MOST_ROWS], title)


def _table(first: str, rows: Sequence[Summary], title: str) -> Table:
    has_error = any(row.error is not None for row in rows)
    table = Table(title=title, title_justify="left", min_width=len(title), box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column(first, no_wrap=True)
    for header in ("asked", "density", "by head", *(("error", "worst") if has_error else ())):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        heads = "-" if row.least is None or row.most is None else f"{row.least:.0%} to {row.most:.0%}"
        errors = (_number(row.error), _number(row.worst)) if has_error else ()
        table.add_row(row.name, _percent(row.asked), _percent(row.density), heads, *errors)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
