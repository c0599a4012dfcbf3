"""The CPU's budget of a whole layer against the oracle in float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.first_order_cases import F64
from tests.kernels.helpers import FirstOrder, make_problem


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    clusters=st.tuples(st.integers(1, 6), st.integers(1, 30)),
    input_scale=st.sampled_from([0.3, 1.0, 4.0]),
    density=st.floats(0.0, 1.0),
    members=st.booleans(),
)
def test_selection_equals_the_oracle(
    cpu: ModuleType,
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    clusters: tuple[int, int],
    input_scale: float,
    density: float,
    members: bool,
) -> None:
    problem = make_problem(
        seed=seed, batch=batch, q_heads=kv_heads * group, kv_heads=kv_heads, num_q_clusters=clusters[0],
        num_k_clusters=clusters[1], input_scale=input_scale,
    )  # fmt: skip
    case = FirstOrder.of(problem)
    args = case.select_args(density, members)
    actual = cpu.select_blocks_of_layer(*args)
    expected = reference.select_blocks_of_layer(*args, compute_dtype=F64)
    # Rounding may let blocks of nearly the same priority change places, at the edge of the budget.
    assert int((actual != expected).flatten(1).sum(dim=1).max()) <= 2


@pytest.mark.parametrize("priorities", ["equal", "minus infinity"])
def test_ties_go_to_the_first_in_order(cpu: ModuleType, priorities: str) -> None:
    case = FirstOrder.of(make_problem(num_k_clusters=8))
    problem = case.problem
    problem.q_offsets[:] = torch.tensor([0, 10, 20, 30, 40, 130, 130], dtype=torch.int32)
    problem.k_offsets[:] = torch.arange(0, 110, 10, dtype=torch.int32).clamp(max=80)
    log_mass = torch.zeros_like(case.log_mass)
    log_error = torch.full_like(case.log_error, 1.0 if priorities == "equal" else -math.inf)
    args = (log_mass, log_error, torch.zeros_like(case.q_variances), *case.select_args(0.3, members=False)[3:])
    kept = cpu.select_blocks_of_layer(*args)[0, :, :4, :8].flatten()
    # 64 blocks of one size: 30 % are 19.2 of them.
    assert kept.nonzero().squeeze(1).tolist() == (list(range(20)) if priorities == "equal" else [])
    assert torch.equal(cpu.select_blocks_of_layer(*args), reference.select_blocks_of_layer(*args))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_keeps_everything_and_no_other_row_pays(cpu: ModuleType, bad: float) -> None:
    case = FirstOrder.of(make_problem(num_k_clusters=20))
    args = list(case.select_args(0.2))
    cluster = int(case.problem.k_offsets[0, 1].diff()[:20].argmax())
    args[0] = case.log_mass.clone()
    args[0][0, 1, 2, cluster] = bad
    actual, expected = cpu.select_blocks_of_layer(*args), reference.select_blocks_of_layer(*args)
    assert torch.equal(actual, expected)
    filled = case.problem.k_offsets[0, 1].diff()[:20] > 0
    assert torch.equal(actual[0, 1, 2, :20], filled)


def test_no_batch_gives_no_map(cpu: ModuleType) -> None:
    case = FirstOrder.of(make_problem(batch=0))
    assert cpu.select_blocks_of_layer(*case.select_args(0.2)).shape == (0, 2, 6, 11)
