"""The oracle's budget of a whole layer, by hand and by its promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.first_order_cases import F64, density_of_clusters
from tests.kernels.helpers import FirstOrder, make_problem


def by_hand(density: float, **changes: Any) -> list[list[list[bool]]]:
    """Two heads of two query clusters (of 1 and 3 queries) and three key clusters (of 2, 1 and 0 keys), without
    variance and with rows of mass 1: what is kept of the first two key clusters."""
    error = torch.tensor([[[4.0, 1.0, 9.0], [0.5, 0.0, 9.0]], [[3.0, 3.0, 9.0], [0.1, 8.0, 9.0]]])
    given_args: dict[str, Any] = {
        "log_mass": torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).log().expand(1, 2, 2, 5).clone(),
        "log_error": error.log()[None],
        "q_variances": torch.zeros(1, 2, 2, 3),
        "k_centroids": torch.zeros(1, 2, 3, 3),
        "q_sizes": torch.tensor([1, 3], dtype=torch.int32).expand(1, 2, 2),
        "k_offsets": torch.tensor([0, 2, 3, 3, 3, 3], dtype=torch.int32).expand(1, 2, 6),
        "scale": 1.0,
        "density": torch.tensor(density),
    }
    block_map = reference.select_blocks_of_layer(**{**given_args, **changes})
    assert bool(block_map[0, :, 2, :4].all()) and bool(block_map[0, :, :, 3].all())
    assert not bool(block_map[..., 4].any()) and not bool(block_map[:, :, 3, :3].any())
    assert bool(block_map[:, :, :2, 2].any()) == (density >= 1)
    kept: list[list[list[bool]]] = block_map[0, :, :2, :2].tolist()
    return kept


def test_the_largest_error_per_pair_first() -> None:
    # Errors per key: head 0 [2, 1], [.25, 0]; head 1 [1.5, 3], [.05, 8]. Pairs: [2, 1], [6, 3] in each head, 24 in all.
    assert by_hand(0.0) == [[[False, False], [False, False]], [[False, False], [False, False]]]
    assert by_hand(3 / 24) == [[[False, False], [False, False]], [[False, False], [False, True]]]
    assert by_hand(3.9 / 24) == [[[False, False], [False, False]], [[False, True], [False, True]]]
    assert by_hand(4.5 / 24) == [[[True, False], [False, False]], [[False, True], [False, True]]]
    # All but the block without error.
    assert by_hand(0.999) == [[[True, True], [True, False]], [[True, True], [True, True]]]
    assert by_hand(1.0) == [[[True, True], [True, True]], [[True, True], [True, True]]]


def test_rows_count_by_their_mass_and_blocks_by_their_variance() -> None:
    light = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).log().expand(1, 2, 2, 5).clone()
    light[0, 0, 1] -= 3.0  # e^6 times the priority: 0.25 becomes 100
    assert by_hand(5 / 24, log_mass=light)[0][1] == [True, False]
    context = light.clone()
    context[0, 0, 1, 3] = 9.0  # but not if the row's mass lies on the context
    assert by_hand(5 / 24, log_mass=context)[0][1] == [False, False]
    # u = var (c_j - cbar)^2, cbar in the middle: both clusters of the row are a distance of 2 away.
    variances, keys = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 3, 3)
    variances[0, 0, 1, 0] = 3.0
    keys[0, 0, :, 0] = torch.tensor([-2.0, 2.0, math.nan])  # an empty cluster's centroid may be anything
    assert by_hand(5 / 24, q_variances=variances, k_centroids=keys)[0][1] == [True, False]  # 0.25 e^6
    variances[0, 0, 1, 0] = 1e9  # at most e^8: 0.25 e^8 = 745
    large = torch.tensor([[[4.0, 1.0, 9.0], [0.5, 0.0, 9.0]], [[3.0, 3.0, 9.0], [0.1, 800.0, 9.0]]]).log()[None]
    assert by_hand(3 / 24, q_variances=variances, k_centroids=keys, log_error=large)[0][1] == [False, False]


def test_blocks_count_by_the_squares_of_what_far_members_attend() -> None:
    """Every number of the rule, by hand: with a context, an empty cluster and a query cluster of fewer members."""
    problem = make_problem(q_heads=2, kv_heads=1, num_queries=30, num_q_clusters=4, num_k_clusters=9, input_scale=4.0)
    case = FirstOrder.of(problem)
    rated = []
    for h in range(2):
        for i, size in enumerate(problem.q_offsets[0, h].diff()[:4].tolist()):
            mass = case.log_mass[0, h, i, :10].double()  # of the clusters and the context
            for j, keys in enumerate(problem.k_offsets[0, 0].diff()[:9].tolist()):
                if size == 0 or keys == 0:
                    continue
                boost = math.exp(_variance_boost(case, h, i, j))
                for member in case.far_members[0, h, i, : min(3, size)].double():
                    gain = problem.scale * torch.nan_to_num(problem.k_centroids[0, 0].double()) @ member
                    share = torch.softmax(mass + torch.cat([gain, torch.zeros(1)]), dim=0)[j]
                    boost += float(share / torch.softmax(mass, dim=0)[j]) ** 2 / size
                priority = float(case.log_error[0, h, i, j] - 2 * mass.logsumexp(0)) - math.log(keys) + math.log(boost)
                rated.append((priority, h, i, j, size * keys))
    rated.sort(reverse=True)
    budget, expected = 0.4 * sum(block[-1] for block in rated), set()
    for _, h, i, j, pairs in rated:
        if budget > 0:
            expected.add((h, i, j))
        budget -= pairs
    block_map = reference.select_blocks_of_layer(*case.select_args(0.4), compute_dtype=F64)
    assert {tuple(place) for place in block_map[0, :, :4, :9].nonzero().tolist()} == expected
    without = reference.select_blocks_of_layer(*case.select_args(0.4, members=False), compute_dtype=F64)
    assert not torch.equal(without, block_map)


def _variance_boost(case: FirstOrder, h: int, i: int, j: int) -> float:
    keys = torch.nan_to_num(case.problem.k_centroids[0, 0].double())
    mean = torch.softmax(case.log_mass[0, h, i, :9].double(), dim=0) @ keys
    return min(8.0, 0.5 * float(case.problem.scale**2 * case.q_variances[0, h, i].double() @ (keys[j] - mean).square()))


@pytest.mark.parametrize("bad", ["mass", "error"])
def test_a_row_with_a_nan_keeps_everything_outside_the_budget(bad: str) -> None:
    log_mass = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).log().expand(1, 2, 2, 5).clone()
    log_error = torch.tensor([[[4.0, 1.0, 9.0], [0.5, 0.0, 9.0]], [[3.0, 3.0, 9.0], [0.1, 8.0, 9.0]]]).log()[None]
    (log_mass if bad == "mass" else log_error)[0, 1, 0, 0] = math.nan
    kept = by_hand(2.9 / 21, log_mass=log_mass, log_error=log_error)
    assert kept == [[[False, False], [False, False]], [[True, True], [False, True]]]
    # An empty cluster's estimate says nothing.
    (log_mass if bad == "mass" else log_error)[0, 1, 0] = torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0])[
        : 5 if bad == "mass" else 3
    ]
    assert by_hand(0.0, log_mass=log_mass, log_error=log_error)[1][0] == [False, False]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    clusters=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    input_scale=st.sampled_from([0.3, 1.0, 4.0]),
    density=st.floats(0.0, 0.99),
)
def test_the_budget_is_met_within_one_block(
    seed: int, kv_heads: int, group: int, clusters: tuple[int, int], input_scale: float, density: float
) -> None:
    problem = make_problem(
        seed=seed, q_heads=kv_heads * group, kv_heads=kv_heads, num_q_clusters=clusters[0],
        num_k_clusters=clusters[1], input_scale=input_scale,
    )  # fmt: skip
    case = FirstOrder.of(problem)
    block_map = reference.select_blocks_of_layer(*case.select_args(density), compute_dtype=F64)
    kept, largest = density_of_clusters(block_map, problem.q_offsets, problem.k_offsets)
    everything = reference.select_blocks_of_layer(*case.select_args(0.9999), compute_dtype=F64)
    most, _ = density_of_clusters(everything, problem.q_offsets, problem.k_offsets)
    assert kept < density + largest + 1e-6
    assert kept >= min(density, most) - 1e-6
