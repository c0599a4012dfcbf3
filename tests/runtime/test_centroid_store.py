"""The store: places kept apart, bounded over all videos, and what goes first."""

from __future__ import annotations

import logging

import pytest
import torch

from svg2_compile.runtime.centroid_store import CentroidStore

ENTRY_BYTES = 4 * 100


def _centroids(value: float = 0.0) -> list[torch.Tensor]:
    return [torch.full((50,), value), torch.full((50,), value)]


def test_videos_layers_and_keys_are_kept_apart() -> None:
    store = CentroidStore(1 << 20)
    places = [(video, layer, key) for video in (0, 1) for layer in ("a", "b") for key in (0, ("cond", 1))]
    for number, place in enumerate(places):
        store.put(*place, _centroids(float(number)))
    for number, place in enumerate(places):
        found = store.fetch(*place)
        assert found is not None and float(found[1][0]) == number
    assert store.fetch(2, "a", 0) is None and store.fetch(0, "c", 0) is None and store.fetch(0, "a", 1) is None
    assert (store.num_entries, store.num_bytes) == (8, 8 * ENTRY_BYTES)


def test_a_new_entry_takes_the_place_of_the_old_one() -> None:
    store = CentroidStore(1 << 20)
    store.put(0, "a", 0, _centroids(1.0))
    store.put(0, "a", 0, [torch.full((7,), 2.0)])
    (found,) = store.fetch(0, "a", 0) or ()
    assert float(found[0]) == 2.0
    assert (store.num_entries, store.num_bytes) == (1, 28)


def test_what_is_fetched_for_the_last_time_is_let_go() -> None:
    store = CentroidStore(1 << 20)
    store.put(0, "a", 0, _centroids(1.0))
    assert store.fetch(0, "a", 0, last=True) is not None
    assert store.fetch(0, "a", 0) is None
    assert (store.num_entries, store.num_bytes) == (0, 0)


def test_the_video_that_began_first_goes_first() -> None:
    store = CentroidStore(3 * ENTRY_BYTES)
    for video in (0, 1, 2):
        store.put(video, "a", 0, _centroids())
    store.fetch(0, "a", 0)  # to be used lately does not help
    store.put(2, "b", 0, _centroids())
    assert [store.fetch(video, "a", 0) is not None for video in (0, 1, 2)] == [False, True, True]
    assert store.num_bytes == 3 * ENTRY_BYTES


def test_layers_that_take_turns_do_not_push_each_other_out(caplog: pytest.LogCaptureFixture) -> None:
    """Ten windows where six fit: six are carried from step to step, four are clustered anew. Said once."""
    store = CentroidStore(6 * ENTRY_BYTES)
    with caplog.at_level(logging.WARNING, logger="svg2_compile"):
        for _ in range(3):
            seeded = [store.fetch(0, "a", window) is not None for window in range(10)]
            for window in range(10):
                store.put(0, "a", window, _centroids())
    assert seeded == [True] * 6 + [False] * 4
    assert store.num_bytes == 6 * ENTRY_BYTES
    assert [record.getMessage().count("store_limit_mb") for record in caplog.records] == [2]


def test_one_entry_is_kept_even_over_the_limit() -> None:
    store = CentroidStore(10)
    store.put(0, "a", 0, _centroids())
    store.put(0, "a", 1, _centroids())
    assert store.fetch(0, "a", 0) is not None and store.fetch(0, "a", 1) is None


def test_drop_and_clear() -> None:
    store = CentroidStore(1 << 20)
    for video in (0, 1):
        for layer in ("a", "b"):
            store.put(video, layer, 0, _centroids())
    store.drop_layer("a")
    assert store.num_entries == 2 and store.num_bytes == 2 * ENTRY_BYTES
    store.drop_video(0)
    store.drop_video(7)
    assert store.num_entries == 1 and store.fetch(1, "b", 0) is not None
    store.clear()
    assert (store.num_entries, store.num_bytes) == (0, 0)
