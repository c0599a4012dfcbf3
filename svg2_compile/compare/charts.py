"""Where things lie in a chart. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bars", "Line", "Tick", "bar_chart", "line_chart"]

WIDTH, HEIGHT = 520.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 30.0
MOST_TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A label at a coordinate."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A value in a line chart. missing: it is infinite or undefined and drawn at the upper edge."""

    x: float
    y: float
    label: str
    missing: bool = False


@dataclass(frozen=True)
class Line:
    """One line over frames or steps."""

    title: str
    points: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str

    @property
    def path(self) -> str:
        """Of the finite points, with gaps at the others."""
        parts, pen = [], "M"
        for point in self.points:
            if point.missing:
                pen = "M"
                continue
            parts.append(f"{pen}{point.x:.1f} {point.y:.1f}")
            pen = "L"
        return " ".join(parts)


@dataclass(frozen=True)
class Bar:
    """A bar from y down to the axis."""

    x: float
    y: float
    width: float
    height: float
    series: str
    label: str


@dataclass(frozen=True)
class Bars:
    """Two bars per step."""

    title: str
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str


def line_chart(
    title: str, values: Sequence[float], unit: str, digits: int, x_label: str = "frame", from_zero: bool = False
) -> Line:
    """A value per frame or step; infinite ones (identical frames) are marked at the upper edge."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = max((high - low) * 0.12, abs(high) * 0.01, 1e-3)
    low, high = 0.0 if from_zero else low - room, high + room
    ticks = _round_ticks(low, high)
    points = []
    for index, value in enumerate(values):
        x = _x(index, len(values))
        missing = not math.isfinite(value)
        words = "identical" if missing else f"{value:.{digits}f}{unit}"
        points.append(Point(x, TOP if missing else _y(value, low, high), f"{x_label} {index}: {words}", missing))
    y_ticks = [Tick(_y(tick, low, high), f"{tick:g}") for tick in ticks]
    return Line(title, points, _x_ticks(len(values)), y_ticks, x_label)


def bar_chart(title: str, dense: Sequence[float], sparse: Sequence[float]) -> Bars:
    """Seconds of every step, dense beside sparse."""
    high = max([*dense, *sparse, 1e-6]) * 1.05
    ticks = [tick for tick in _round_ticks(0.0, high) if tick >= 0]
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(dense))
    width = slot * 0.36
    bars = []
    for step in range(len(dense)):
        for index, (series, values) in enumerate((("dense", dense), ("sparse", sparse))):
            y = _y(values[step], 0.0, high)
            x = LEFT + slot * (step + 0.5) + (index - 1) * width
            label = f"step {step}, {series}: {_seconds(values[step])}"
            bars.append(Bar(x, y, width * 0.94, HEIGHT - BOTTOM - y, series, label))
    every = _stride(len(dense))
    x_ticks = [Tick(LEFT + slot * (step + 0.5), str(step)) for step in range(0, len(dense), every)]
    return Bars(title, bars, x_ticks, [Tick(_y(tick, 0.0, high), f"{tick:g}") for tick in ticks], "step")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def _x(index: int, count: int) -> float:
    span = WIDTH - LEFT - RIGHT - 16
    return LEFT + 8 + (span * index / (count - 1) if count > 1 else span / 2)


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)


def _stride(count: int) -> int:
    return next((every for every in (1, 2, 5, 10, 20, 50, 100) if count / every <= 12), 200)


def _x_ticks(count: int) -> list[Tick]:
    return [Tick(_x(index, count), str(index)) for index in range(0, count, _stride(count))]


def _round_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two."""
    raw = (high - low) / MOST_TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
