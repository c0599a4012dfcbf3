"""The same on four ranks, one head on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import checks
from tests.distributed.pool import RankPool
from tests.support import IDENTITY, SELECTION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_ulysses(four, name):
    for options in (IDENTITY, SELECTION):
        results = four.run(checks.videos, name, options)
        assert all(result["alone"] < 1e-5 and result["second"] == 0.0 for result in results)
        assert all(result["runs"] == results[0]["runs"] for result in results)
        assert {heads for reason, heads in results[0]["sites"].values() if reason == "sparse"} == {1}


def test_unified_is_dense_because_a_rank_has_some_keys_only(four):
    for result in four.run(checks.videos, "wan", {**IDENTITY, "strict": False}, "ring"):
        assert result["dense"] < 1e-5
        assert {reason for reason, _ in result["sites"].values()} == {"local_keys", "cross_attention"}
