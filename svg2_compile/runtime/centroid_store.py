"""Where the loop-carried centroids live between two calls of a graph."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.logs.logger import get_logger

__all__ = ["CentroidStore"]

log = get_logger()


class CentroidStore:
    """Centroids by layer and key, bounded in bytes.

    Layers are held weakly: when the weights of a layer die, its centroids go with them. Within a layer, the key tells
    graph, guidance branch and shape apart. Over the limit the entries used longest ago are dropped; their layers start
    cold at the next call, which costs time and never correctness.

    Args:
        limit_bytes: most bytes of centroids kept; at least one entry is always kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.evictions = 0
        self._layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._clock = itertools.count()

    def fetch(self, layer: Any, key: Hashable) -> tuple[torch.Tensor, ...] | None:
        """The centroids kept under ``key``, or None."""
        entry = self._layers.get(layer, {}).get(key)
        if entry is None:
            return None
        entry[0] = next(self._clock)
        tensors: tuple[torch.Tensor, ...] = entry[1]
        return tensors

    def put(self, layer: Any, key: Hashable, centroids: Sequence[torch.Tensor]) -> None:
        """Keep ``centroids`` under ``key`` in the place of what was there."""
        entries = self._layers.get(layer)
        if entries is None:
            entries = self._layers[layer] = {}
        entries[key] = [next(self._clock), tuple(centroids)]
        self._enforce_limit()

    def drop(self, layer: Any) -> None:
        """Forget all that is kept for one layer."""
        self._layers.pop(layer, None)

    def clear(self) -> None:
        """Forget everything."""
        self._layers.clear()

    @property
    def num_entries(self) -> int:
        return sum(len(entries) for entries in self._layers.values())

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for entries in self._layers.values()
            for _, tensors in entries.values()
            for tensor in tensors
        )

    def _enforce_limit(self) -> None:
        while self.num_bytes > self.limit_bytes and self.num_entries > 1:
            layer, key = min(
                ((layer, key) for layer, entries in self._layers.items() for key in entries),
                key=lambda place: self._layers[place[0]][place[1]][0],
            )
            del self._layers[layer][key]
            self.evictions += 1
            if self.evictions == 1:
                log.warning(
                    "centroid store is over its limit of %.0f MB: dropping the centroids used longest ago. Their "
                    "layers start k-means cold; raise store_limit_mb to avoid it.",
                    self.limit_bytes / 2**20,
                )
