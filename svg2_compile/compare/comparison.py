"""Comparison: what a pair of runs, one dense and one sparse, showed, and the files that show it."""

from __future__ import annotations

import json
from pathlib import Path

from svg2_compile.compare.html import render
from svg2_compile.compare.pair import Pair

__all__ = ["Comparison"]


class Comparison(Pair):
    """A pair that can be written down: as numbers, as a page, as a picture of its attention maps."""

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def write_html(self, path: str | Path) -> Path:
        """Write the page: one file that refers to nothing outside itself. Returns its path."""
        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path

    def write_maps(self, path: str | Path) -> Path:
        """Write the attention maps as one PNG. Returns its path.

        Raises:
            ValueError: no maps were asked for.
        """
        if self.maps is None:
            raise ValueError("maps: none were computed. Valid: compare with maps=True.")
        from svg2_compile.compare.pictures import maps_picture

        maps_picture(self.maps).save(path)
        return Path(path)
