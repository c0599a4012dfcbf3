"""Real diffusers pipelines on two ranks: the same videos as on one, and never two ranks in different graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed import checks
from tests.distributed.pool import RankPool
from tests.support import IDENTITY, SELECTION

pytestmark = pytest.mark.slow

# Several orders of summation, a few layers and steps apart.
ROUNDING = 1e-5
POOLED: dict[str, Any] = {
    **IDENTITY,
    "top_p": None,
    "density": 0.5,
    "compensation": "first_order",
    "routing": "auto",
    "budget": "layer",
    "min_k_ratio": 0.0,
}
LENIENT = {**IDENTITY, "strict": False}


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def _videos(pool: RankPool, *args: Any) -> list[dict[str, Any]]:
    results = pool.run(checks.videos, *args)
    first = results[0]
    assert all(result["runs"] == first["runs"] and result["sites"] == first["sites"] for result in results)
    assert all(result["second"] == 0.0 for result in results), "the second video is the first again"
    return results


def _sparse(result: dict[str, Any]) -> int:
    return sum(count for (_, graph), count in result["runs"].items() if graph == "sparse")


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_diffusers_alone_is_equal(two, name):
    assert max(two.run(checks.diffusers_alone, name)) < ROUNDING


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_ulysses_at_full_mass_is_dense_attention(two, name, regional):
    for result in _videos(two, name, IDENTITY, "ulysses", regional):
        assert result["dense"] < ROUNDING and result["alone"] < ROUNDING and not result["notes"]
        # A rank has half of the heads, and every self-attention over the video is sparse in every step.
        sparse = {site: heads for site, (reason, heads) in result["sites"].items() if reason == "sparse"}
        assert set(sparse.values()) == {2} and not any("closure" in site for site in result["sites"])
        assert {site for site, graph in result["runs"] if graph == "sparse"} == set(sparse)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_ulysses_with_a_selection_of_each_head_is_that_of_one_process(two, name):
    for result in _videos(two, name, SELECTION):
        assert result["alone"] < ROUNDING < result["dense"] and _sparse(result)


def test_pooled_budgets_are_those_of_the_heads_of_a_rank(two):
    for result in _videos(two, "wan", POOLED):
        assert result["alone"] < 0.02 and result["dense"] < 0.05 and _sparse(result)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_balanced_heads_compute_the_same(two, name):
    """Where every head selects for itself, it does not matter which rank has it."""
    own, other = two.run(checks.balanced, name, SELECTION)
    assert own["alone"] < ROUNDING and own["second"] == 0.0 and own["orders"] == other["orders"]
    orders = [order for call in own["orders"] for order in call]
    assert orders and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert any(order != [0, 1, 2, 3] for order in orders)


def test_plain_torch_compile(two):
    for result in two.run(checks.plainly_compiled, "wan"):
        assert result["dense"] < ROUNDING and result["graphs"] == {"sparse"}


def test_tensor_parallel(two):
    for result in _videos(two, "cogvideox", IDENTITY, "tensor parallel"):
        assert result["dense"] < ROUNDING and _sparse(result)
        assert {heads for reason, heads in result["sites"].values() if reason == "sparse"} == {2}


def test_fully_sharded_weights(two):
    for result in _videos(two, "wan", LENIENT, "fully sharded", True):
        assert result["dense"] < ROUNDING and _sparse(result)


# ------------------------------------------------------------------------------------------------ dense, with a reason
def test_a_ring_is_dense_because_a_rank_has_some_keys_only(two):
    for result in _videos(two, "wan", LENIENT, "ring"):
        assert result["dense"] < ROUNDING and not _sparse(result)
        assert {reason for reason, _ in result["sites"].values()} == {"local_keys", "cross_attention"}


def test_shards_of_any_size_are_dense_and_told_of(two):
    for result in _videos(two, "wan", LENIENT, "anything"):
        assert result["dense"] < ROUNDING and not result["runs"]
        assert len(result["notes"]) == 1 and "ulysses_anything=True" in result["notes"][0]


# ------------------------------------------------------------------------------------------------ ranks that differ
@pytest.mark.parametrize("options", [{"dense_steps": 1}, {"min_tokens": 1000}, {"num_k_clusters": 6}], ids=str)
def test_ranks_with_other_options_are_all_dense(two, options):
    own, other = two.run(checks.with_other_options, "wan", options)
    assert own["dense"] < ROUNDING and other["dense"] < ROUNDING
    assert own["reasons"] == {"ranks_differ"} and "sparse" not in other["reasons"]


@pytest.mark.parametrize("when", ["at once", "lazily"])
def test_a_rank_that_cannot_compile_makes_all_dense(two, when):
    own, other = two.run(checks.with_a_failing_compiler, "wan", when)
    assert own["dense"] < ROUNDING and other["dense"] < ROUNDING
    dense_steps = ["dense_steps"] if when == "lazily" else []
    assert own["reasons"] == [[*dense_steps, "ranks_differ"]] * 3
    assert all(set(reasons) <= {"failed"} for reasons in other["reasons"])
