"""The table of stages, from what bench.stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.common import markdown

__all__ = ["added_table", "stages_table"]


def stages_table(document: Mapping[str, Any]) -> str:
    """The share of every stage in the time of a rewritten attention."""
    results = document["results"]
    rows = [[name, *(f"{result['share'][name]:.1%}" for result in results)] for name in results[0]["share"]]
    density, heads = document["density"], document["heads"]
    about = f"{heads} heads of {results[0]['head_dim']} at {density:.0%} density, float32, one thread; of the whole."
    header = ["stage", *(f"{result['num_tokens']:,} tokens" for result in results)]
    return f"{about}\n\n{markdown(header, rows)}"


def added_table(document: Mapping[str, Any]) -> str:
    """What the default takes over SVG-EAR at equal density; in brackets the middle half of pairs."""
    cells: dict[tuple[int, int], dict[float, str]] = {}
    for row in document["added"]:
        low, high = row["middle_half"]
        text = f"{row['added']:+.1%} ({low:+.1%} to {high:+.1%})"
        cells.setdefault((row["num_tokens"], row["head_dim"]), {})[row["density"]] = text
    densities = sorted({row["density"] for row in document["added"]})
    rows = [[f"{tokens:,} x {dim}", *(own[density] for density in densities)] for (tokens, dim), own in cells.items()]
    return markdown(["tokens x head_dim", *(f"at {density:.0%}" for density in densities)], rows)
