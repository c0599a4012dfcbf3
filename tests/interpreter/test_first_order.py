"""First-order compensation and pooled budgets in Triton against the oracle in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.triton import implementation, launch
from tests.kernels.first_order_cases import F64, attention_answers, check_estimates, check_residual, check_terms
from tests.kernels.helpers import FirstOrder, assert_within_budget, make_problem

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"num_queries": 45, "num_keys": 70},
    "one token": {"num_queries": 1, "num_keys": 1, "num_q_clusters": 1, "num_k_clusters": 1, "keep": 0.0},
    "grouped heads, batch 2": {"batch": 2, "q_heads": 4, "kv_heads": 2, "num_queries": 33, "num_keys": 40},
    "odd head_dim": {"head_dim": 19, "num_queries": 40, "num_keys": 50},
    "value wider": {"head_dim": 8, "value_dim": 24, "num_queries": 40, "num_keys": 50},
    "value narrower": {"head_dim": 24, "value_dim": 7, "num_queries": 40, "num_keys": 50},
    "nothing kept": {"keep": 0.0, "num_queries": 70, "num_keys": 130},
    "all kept": {"keep": 1.1, "num_queries": 40, "num_keys": 90},
    "no keys": {"num_keys": 0},
    "no queries": {"num_queries": 0},
    "no batch": {"batch": 0},
}


def check_attention(case: FirstOrder, roundings: float = 16.0) -> None:
    exact, exact_lse, _ = attention_answers(case)
    eager, _ = reference.first_order_attention(*case.attention_args, compute_dtype=case.problem.query.dtype)
    out, lse = implementation.first_order_attention(*case.attention_args)
    assert out.dtype == case.problem.query.dtype and out.is_contiguous()
    assert_within_budget(out, exact, eager, roundings)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    finite = exact_lse.isfinite()
    tolerance = 2e-2 if case.problem.query.dtype != torch.float32 else 2e-5
    torch.testing.assert_close(lse[finite], exact_lse[finite], rtol=tolerance, atol=tolerance)


def check_all(case: FirstOrder) -> None:
    check_estimates(case, *implementation.block_estimates(*case.estimate_args))
    check_residual(case, implementation.first_order_estimates(*case.estimate_args)[2], case.residual_of_all)
    check_terms(case, *implementation.first_order_terms(*(*case.term_args, case.residual_of_all)))
    check_attention(case)


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str) -> None:
    check_all(FirstOrder.of(make_problem(**SHAPES[shape])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_scale", [1.0, 4.0])
def test_dtypes_and_input_scales(dtype: torch.dtype, input_scale: float) -> None:
    case = FirstOrder.of(make_problem(dtype=dtype, input_scale=input_scale, num_queries=60, num_keys=90))
    check_all(case)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_negative_and_zero_scale(scale: float) -> None:
    problem = dataclasses.replace(make_problem(num_queries=45, num_keys=70), scale=scale)
    check_attention(FirstOrder.of(problem))


def test_rows_without_keys_far_below_one() -> None:
    """All logits are -60: whoever takes 0 for the largest of no keys loses such rows."""
    problem = make_problem(num_queries=45, num_keys=70, keep=0.0, input_scale=0.1)
    problem.query[..., 0], problem.key[..., 0] = 10.0, -24.0
    case = FirstOrder.of(dataclasses.replace(problem, **_means(problem)))
    assert float(case.log_mass.amax()) < -50
    check_attention(case, roundings=16 * 60)


def _means(problem: Any) -> dict[str, Any]:
    tokens = {"k_centroids": problem.key, "v_centroids": problem.value}
    return {name: reference.cluster_means(x, problem.k_offsets) for name, x in tokens.items()}


def test_tokens_in_token_order_give_the_same() -> None:
    case = FirstOrder.of(make_problem(num_queries=45, num_keys=70))
    q_order, k_order = (torch.arange(n - 1, -1, -1, dtype=torch.int32).expand(1, 2, n) for n in (45, 70))
    flipped = [x.flip(2) for x in case.attention_args[:3]]
    arguments = (*flipped, *case.attention_args[3:], q_order, k_order)
    out, lse = implementation.first_order_attention(*arguments)
    expected, expected_lse = implementation.first_order_attention(*case.attention_args)
    torch.testing.assert_close(out.flip(2), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.flip(2), expected_lse, rtol=0, atol=1e-6)


def test_nothing_is_added_where_nothing_is_skipped() -> None:
    case = FirstOrder.of(make_problem(keep=1.1, num_queries=40, num_keys=60))
    broken = dataclasses.replace(case, residual=case.residual + math.nan, slope=case.slope * math.nan)
    out, _ = implementation.first_order_attention(*broken.attention_args)
    expected, _ = implementation.block_sparse_attention(*case.problem.args())
    torch.testing.assert_close(out, expected)


def test_chunks_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FirstOrder.of(make_problem(q_heads=4, kv_heads=2, num_queries=40, num_keys=60))
    monkeypatch.setattr(launch, "SCORE_BYTES", 1)
    check_all(case)


def test_variances() -> None:
    problem = make_problem(num_queries=90)
    case = FirstOrder.of(problem)
    order = torch.arange(89, -1, -1, dtype=torch.int32).expand(1, 2, 90)
    actual = implementation.cluster_variances(problem.query.flip(2), order, problem.q_offsets, case.q_centroids)
    torch.testing.assert_close(actual, case.q_variances, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_farthest_members(count: int, dtype: torch.dtype) -> None:
    problem = make_problem(num_queries=300, dtype=dtype)
    case = FirstOrder.of(problem)
    order = torch.arange(299, -1, -1, dtype=torch.int32).expand(1, 2, 300)
    args = (problem.query.flip(2), order, problem.q_offsets, case.q_centroids, count)
    expected = reference.farthest_members(*args, compute_dtype=F64)
    torch.testing.assert_close(implementation.farthest_members(*args), expected)
    assert bool(expected.any())


def test_of_equally_far_members_the_first_and_none_beyond_the_last() -> None:
    x, order = torch.tensor([1.0, -1.0, 2.0, 1.0])[:, None].expand(1, 1, 4, 2), torch.arange(4, dtype=torch.int32)
    offsets = torch.tensor([0, 4, 4, 4, 4], dtype=torch.int32).expand(1, 1, 5)
    args = (x, order.expand(1, 1, 4), offsets, torch.zeros(1, 1, 2, 2), 5)
    kept = implementation.farthest_members(*args)
    assert kept[0, 0, :, :, 0].tolist() == [[2.0, 1.0, -1.0, 1.0, 0.0], [0.0] * 5]


# ------------------------------------------------------------------------------------------------------- pooled budgets
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [{"batch": 2, "q_heads": 4, "kv_heads": 2}, {"num_k_clusters": 1}, {"num_keys": 900}])
@pytest.mark.parametrize("members", [True, False])
def test_the_pool_is_the_oracles(density: float, shape: dict[str, Any], members: bool) -> None:
    case = FirstOrder.of(make_problem(**shape))
    args = case.select_args(density, members)
    actual = implementation.select_blocks_of_layer(*args)
    expected = reference.select_blocks_of_layer(*args, compute_dtype=F64)
    # Rounding may let blocks of nearly the same priority change places, at the edge of the budget.
    assert int((actual != expected).flatten(1).sum(dim=1).max()) <= 2


def test_ties_go_to_the_first_in_order() -> None:
    case = FirstOrder.of(make_problem(num_k_clusters=8))
    case.problem.q_offsets[:] = torch.tensor([0, 10, 20, 30, 40, 130, 130], dtype=torch.int32)
    case.problem.k_offsets[:] = torch.arange(0, 110, 10, dtype=torch.int32).clamp(max=80)
    for error in (1.0, -math.inf):
        estimates = (torch.zeros_like(case.log_mass), torch.full_like(case.log_error, error))
        args = (*estimates, torch.zeros_like(case.q_variances), *case.select_args(0.3, members=False)[3:])
        actual = implementation.select_blocks_of_layer(*args)
        assert torch.equal(actual, reference.select_blocks_of_layer(*args))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_keeps_everything_and_no_other_row_pays(bad: float) -> None:
    case = FirstOrder.of(make_problem(num_k_clusters=20))
    args = list(case.select_args(0.2))
    args[0] = case.log_mass.clone()
    args[0][0, 1, 2, int(case.problem.k_offsets[0, 1].diff()[:20].argmax())] = bad
    assert torch.equal(implementation.select_blocks_of_layer(*args), reference.select_blocks_of_layer(*args))
