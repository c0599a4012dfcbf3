"""The store of loop-carried centroids: keys, bound, weak layers."""

from __future__ import annotations

import gc
import logging

import torch

from svg2_compile.runtime.centroid_store import CentroidStore


class Layer:
    """Stands for the weights of a call."""


def _centroids(value: float) -> list[torch.Tensor]:
    return [torch.full((1, 2, 4, 8), float(value))]


BYTES = 1 * 2 * 4 * 8 * 4


def test_layers_contexts_and_shapes_are_kept_apart():
    store, first, second = CentroidStore(1 << 20), Layer(), Layer()
    store.put(first, (0, 128), _centroids(1))
    store.put(first, (1, 128), _centroids(2))
    store.put(second, (0, 128), _centroids(3))
    places = ((first, (0, 128)), (first, (1, 128)), (second, (0, 128)))
    assert [store.fetch(*place)[0].unique().item() for place in places] == [1, 2, 3]
    assert store.fetch(first, (0, 256)) is None
    assert (store.num_entries, store.num_bytes) == (3, 3 * BYTES)


def test_a_layer_takes_its_centroids_with_it():
    store, layer = CentroidStore(1 << 20), Layer()
    store.put(layer, 0, _centroids(1))
    del layer
    gc.collect()
    assert (store.num_entries, store.num_bytes) == (0, 0)


def test_the_longest_unused_goes_first(caplog):
    store, layer = CentroidStore(2 * BYTES), Layer()
    store.put(layer, "a", _centroids(1))
    store.put(layer, "b", _centroids(2))
    store.fetch(layer, "a")
    with caplog.at_level(logging.WARNING, "svg2_compile"):
        store.put(layer, "c", _centroids(3))
        store.put(layer, "d", _centroids(4))
    assert store.fetch(layer, "b") is None and store.fetch(layer, "a") is None
    assert store.fetch(layer, "c") is not None and store.fetch(layer, "d") is not None
    assert store.evictions == 2
    assert len(caplog.records) == 1 and "store_limit_mb" in caplog.text


def test_one_entry_is_kept_even_over_the_limit():
    store, layer = CentroidStore(1), Layer()
    store.put(layer, "a", _centroids(1))
    assert store.fetch(layer, "a") is not None


def test_drop_and_clear():
    store, first, second = CentroidStore(1 << 20), Layer(), Layer()
    store.put(first, 0, _centroids(1))
    store.put(second, 0, _centroids(2))
    store.drop(first)
    assert store.fetch(first, 0) is None and store.fetch(second, 0) is not None
    store.clear()
    assert store.num_entries == 0
