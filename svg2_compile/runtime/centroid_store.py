"""Where the loop-carried centroids live between two calls of a graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from svg2_compile.logs.logger import get_logger

__all__ = ["CentroidStore"]

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Entry:
    tensors: tuple[torch.Tensor, ...]
    num_bytes: int


class CentroidStore:
    """Centroids by video, layer and key, bounded in bytes over all videos.

    Within a layer, the key tells graph, guidance branch and shape apart. Where a video needs room, the centroids of the
    video that began first go first; what does not fit then is not kept: it is clustered anew at every step, which costs
    time and never correctness. (To drop what was used longest ago would leave nothing of a video whose layers and
    windows take turns.)

    Args:
        limit_bytes: most bytes of centroids kept; one entry is always kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._videos: dict[int, dict[tuple[Hashable, Hashable], _Entry]] = {}
        self._said = False

    def fetch(
        self, video: int, layer: Hashable, key: Hashable, *, last: bool = False
    ) -> tuple[torch.Tensor, ...] | None:
        """The centroids kept under ``key``, or None. ``last``: they are not needed again."""
        entries = self._videos.get(video, {})
        entry = entries.get((layer, key))
        if entry is None:
            return None
        if last:
            del entries[layer, key]
            self.num_bytes -= entry.num_bytes
        return entry.tensors

    def put(self, video: int, layer: Hashable, key: Hashable, centroids: Sequence[torch.Tensor]) -> None:
        """Keep ``centroids`` under ``key`` in the place of what was there."""
        entries = self._videos.setdefault(video, {})
        entry = _Entry(tuple(centroids), sum(tensor.numel() * tensor.element_size() for tensor in centroids))
        previous = entries.pop((layer, key), None)
        if previous is not None:
            self.num_bytes -= previous.num_bytes
        while self.num_bytes + entry.num_bytes > self.limit_bytes and self._drop_oldest_but(video):
            pass
        if self.num_bytes + entry.num_bytes > self.limit_bytes and self.num_bytes:
            self._say_that_it_is_full(entry.num_bytes)
            return
        entries[layer, key] = entry
        self.num_bytes += entry.num_bytes

    def _drop_oldest_but(self, video: int) -> bool:
        """Forget the video that began first, other than ``video``; whether there was one with centroids."""
        others = [number for number, entries in self._videos.items() if number != video and entries]
        if others:
            self.drop_video(min(others))
        return bool(others)

    def _say_that_it_is_full(self, num_bytes: int) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "the centroids of one video take more than store_limit_mb=%.3g (%.1f MiB are kept, the next %.1f MiB "
                "are not): layers, branches or windows beyond that are clustered anew at every step. Raise "
                "store_limit_mb to avoid it.",
                *(self.limit_bytes / 2**20, self.num_bytes / 2**20, num_bytes / 2**20),
            )

    def drop_video(self, video: int) -> None:
        """Forget all that is kept of one video."""
        for entry in self._videos.pop(video, {}).values():
            self.num_bytes -= entry.num_bytes

    def drop_layer(self, layer: Hashable) -> None:
        """Forget all that is kept of one layer, in every video."""
        for entries in self._videos.values():
            for place in [place for place in entries if place[0] is layer]:
                self.num_bytes -= entries.pop(place).num_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._videos.clear()
        self.num_bytes = 0

    @property
    def num_entries(self) -> int:
        return sum(len(entries) for entries in self._videos.values())
