"""The table of stages, from what bench.stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.common import markdown

__all__ = ["stages_table"]


def stages_table(document: Mapping[str, Any]) -> str:
    """The share of every stage in the time of a rewritten attention."""
    results = document["results"]
    rows = [[name, *(f"{result['share'][name]:.1%}" for result in results)] for name in results[0]["share"]]
    density, heads = document["density"], document["heads"]
    about = f"{heads} heads of {results[0]['head_dim']} at {density:.0%} density, float32, one thread; of the whole."
    header = ["stage", *(f"{result['num_tokens']:,} tokens" for result in results)]
    return f"{about}\n\n{markdown(header, rows)}"
