"""The result files of the quality benchmarks, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "ATTENTION",
    "BEFORE",
    "FIRST",
    "FIRST_ORDER",
    "FIRST_ORDER_LAYERS",
    "FIRST_ORDER_SIZES",
    "GUARD",
    "LONG",
    "NO_MEMBERS",
    "PUBLISHED_DENSE_LAYERS",
    "SPEED",
    "STAGES",
    "VIDEO",
    "dense_layers_of",
    "read_results",
]

ATTENTION = "quality_attention"
VIDEO = "quality_video"
FIRST_ORDER = "quality_first_order"
FIRST_ORDER_LAYERS, FIRST_ORDER_SIZES = "quality_first_order_layers", "quality_first_order_sizes"
"""``bench.quality.campaign``: what the default and each of its parts are worth."""
GUARD = "quality_guard"
"""``bench.quality.guard``: densities that follow a target."""
LONG = "quality_video_long"
"""``bench.quality.video`` of a video that is long enough to gain."""
SPEED = "quality_video_speed"
"""``bench.quality.speed`` at the points of that."""


STAGES = "stages"
"""``bench.stages``."""


FIRST, BEFORE = "svg2+first_order", "svg2+comp+ear"
"""The methods that are the default, and were it before."""
NO_MEMBERS = "P by variance + A + B + J"
"""The default without far members: what it was before them."""
PUBLISHED_DENSE_LAYERS = 0.03


def dense_layers_of(method: str) -> float:
    """The share of dense layers that a method is measured with by whole videos: its default, or as published."""
    return 0.0 if method in (FIRST, NO_MEMBERS) else PUBLISHED_DENSE_LAYERS


def read_results(folder: Path, name: str) -> dict[str, Any] | None:
    """The document ``name`` in a folder of results; None if it is not there."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
