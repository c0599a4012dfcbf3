"""What is compared: SVG2, what SVG-EAR adds, and clusters by position instead of meaning, all through one code path."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from bench.quality.position import position_blocks
from svg2_compile.minidit.model import VideoSize

__all__ = ["METHODS", "Method"]

PLAIN = {"compensation": "none"}
COMPENSATED = {"compensation": "centroid", "routing": "score"}
ROUTED = {"compensation": "centroid", "routing": "error"}


@dataclass(frozen=True)
class Method:
    """A curve: where clusters come from, and what becomes of the blocks that were not selected.

    blocks: None for k-means, "raster" or "tiles" for blocks by position. options: those of svg2.
    """

    name: str
    blocks: str | None
    options: dict[str, Any]

    def clusters(self, size: VideoSize) -> AbstractContextManager[object]:
        """Within it, operators cluster as this method does, for videos of ``size``."""
        if self.blocks is None:
            return contextlib.nullcontext()
        return position_blocks(self.blocks, (size.frames, size.height // 4, size.width // 4))


METHODS = (
    Method("svg2", None, PLAIN),
    Method("svg2+comp", None, COMPENSATED),
    Method("svg2+comp+ear", None, ROUTED),
    Method("raster", "raster", PLAIN),
    Method("raster+comp", "raster", COMPENSATED),
    Method("tiles", "tiles", PLAIN),
    Method("tiles+comp", "tiles", COMPENSATED),
    Method("tiles+comp+ear", "tiles", ROUTED),
)
