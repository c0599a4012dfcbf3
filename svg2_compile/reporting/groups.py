"""Repeated layers share a row: "blocks.0.attn1", "blocks.1.attn1" -> "blocks.0-1.attn1"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from svg2_compile.reporting.records import SiteReport

__all__ = ["grouped_sites"]


def grouped_sites(sites: Sequence[SiteReport]) -> list[tuple[str, int, SiteReport]]:
    """Rows for layers that differ in nothing but the numbers in their names, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[SiteReport]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "#", site.name)
        facts = (site.decision, site.reason, site.video_tokens, site.context_tokens, site.num_heads, site.head_dim)
        groups.setdefault((pattern, *facts), []).append(site)
    return [(_common_name([site.name for site in group]), len(group), group[0]) for group in groups.values()]


def _common_name(names: list[str]) -> str:
    """ "blocks.0.attn1", "blocks.1.attn1" -> "blocks.0-1.attn1"."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    merged = []
    for column in zip(*parts, strict=True):
        if len(set(column)) == 1:
            merged.append(column[0])
        else:
            numbers = sorted(int(text) for text in column)
            merged.append(f"{numbers[0]}-{numbers[-1]}")
    return "".join(merged)
