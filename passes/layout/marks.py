"""Picked: the source that marks positions which were picked from an axis by their places."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Picked", "picks_of", "without_picks"]


class Picked(str):
    """The source that marks positions picked from `axis`, one for each of `places` and in their order.

    It stays with positions for as long as none is left out, turned around or mixed with others. axis: an Axis, whose
    file needs this one.
    """

    __slots__ = ("axis", "places")
    axis: Any
    places: fx.Node

    @classmethod
    def of(cls, axis: Any, places: fx.Node) -> Picked:
        """The mark of what `places` picks from `axis`."""
        mark = cls(f"<picked by {places.name} {hash(axis):x}>")
        mark.axis, mark.places = axis, places
        return mark


def picks_of(sources: frozenset[str]) -> list[Picked]:
    """The marks among sources."""
    return [source for source in sources if isinstance(source, Picked)]


def without_picks(sources: frozenset[str]) -> frozenset[str]:
    """The sources of positions that are no longer where they were picked to."""
    marks = picks_of(sources)
    return sources.difference(marks) if marks else sources
