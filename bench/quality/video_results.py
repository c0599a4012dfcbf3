"""What ``bench.quality.video`` wrote: quality of several videos, and speed from a run with the machine to itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["QUALITY", "SPEED", "read_video_results"]

QUALITY = "quality_video"
SPEED = "quality_video_speed"


def read_video_results(folder: Path) -> dict[str, Any] | None:
    """The document of the quality run; its points have the speeds of the speed run, where that measured them too.

    None where there is no quality run.
    """
    path = folder / f"{QUALITY}.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    timed = folder / f"{SPEED}.json"
    speeds = {}
    if timed.exists():
        speeds = {_point(row): row["speedup"] for row in json.loads(timed.read_text())["results"]}
    rows = [{**row, "speedup": speeds.get(_point(row), row.get("speedup"))} for row in document["results"]]
    return {**document, "results": rows}


def _point(row: Mapping[str, Any]) -> tuple[str, str, float]:
    """A method and its selection. Budgets end with a whole block: the density is a little above what was asked for."""
    if "top_p" in row:
        return row["method"], "top_p", row["top_p"]
    return row["method"], "density", round(row["density"], 2)
