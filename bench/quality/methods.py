"""What is compared: SVG2, what SVG-EAR adds, and clusters by position instead of meaning, all through one code path."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from bench.quality.parts import Parts, parts
from bench.quality.position import position_blocks
from bench.quality.results import NO_MEMBERS
from svg2_compile.minidit.model import VideoSize

__all__ = ["GLOBAL_SLOPE", "METHODS", "PARTS", "Method"]

PLAIN = {"compensation": "none"}
COMPENSATED = {"compensation": "centroid", "routing": "score"}
ROUTED = {"compensation": "centroid", "routing": "error", "budget": "row"}
POOLED = {"compensation": "centroid", "routing": "error", "budget": "layer"}
FIRST_ORDER = {"compensation": "first_order", "budget": "layer"}
FIRST_ORDER_ROWS = {"compensation": "first_order", "budget": "row"}


@dataclass(frozen=True)
class Method:
    """A curve: where clusters come from, and what becomes of the blocks that were not selected.

    blocks: None for k-means, "raster" or "tiles" for blocks by position. options: those of svg2. left: the parts of
    first-order compensation, None for all.
    """

    name: str
    blocks: str | None
    options: dict[str, Any]
    left: Parts | None = None

    def clusters(self, size: VideoSize) -> AbstractContextManager[object]:
        """Within it, operators cluster as this method does, for videos of ``size``."""
        if self.left is not None:
            return parts(self.left)
        if self.blocks is None:
            return contextlib.nullcontext()
        return position_blocks(self.blocks, (size.frames, size.height // 4, size.width // 4))


METHODS = (
    Method("svg2", None, PLAIN),
    Method("svg2+comp", None, COMPENSATED),
    Method("svg2+comp+ear", None, ROUTED),
    Method("svg2+first_order", None, FIRST_ORDER),
    Method("raster", "raster", PLAIN),
    Method("raster+comp", "raster", COMPENSATED),
    Method("tiles", "tiles", PLAIN),
    Method("tiles+comp", "tiles", COMPENSATED),
    Method("tiles+comp+ear", "tiles", ROUTED),
    Method("tiles+first_order", "tiles", FIRST_ORDER),
)

GLOBAL_SLOPE = Method("global slope", None, FIRST_ORDER_ROWS, Parts(mass=False, residual=False, slope="head"))
"""Beside centroids one slope per head, as in PISA: no clusters' residual, no exact mass."""

PARTS = (
    Method("P", None, POOLED),
    Method("A + B", None, FIRST_ORDER_ROWS, Parts(mass=True, residual=True, slope="none")),
    Method("A + B + J", None, FIRST_ORDER_ROWS),
    Method("P + A", None, FIRST_ORDER, Parts(mass=True, residual=False, slope="none")),
    Method("P + A + B", None, FIRST_ORDER, Parts(mass=True, residual=True, slope="none")),
    Method("P + J", None, FIRST_ORDER, Parts(mass=False, residual=False, slope="cluster")),
    Method(NO_MEMBERS, None, FIRST_ORDER, Parts(mass=True, residual=True, slope="cluster", members=False)),
)
"""What the parts of "svg2+first_order" (P + A + B + J) are worth; names as in docs/quality.md."""
