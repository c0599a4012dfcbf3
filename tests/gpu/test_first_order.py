"""First-order compensation and pooled budgets on the device against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from tests.gpu.support import moved, poisoned, score_slack, sized
from tests.kernels.first_order_cases import F64, attention_answers, check_estimates, check_residual, check_terms
from tests.kernels.helpers import EDGE_SHAPES, FirstOrder, assert_within_budget, make_problem

# Weights and differences to means are rounded to TF32 for 16-bit tokens, and query centroids as well.
TF32 = 2.0**-11
SIZES: dict[str, Any] = {"num_queries": sized(900, 40), "num_keys": sized(1300, 60), "head_dim": sized(64, 16)}
SHAPES: dict[str, dict[str, Any]] = {
    **EDGE_SHAPES,
    "plain": SIZES,
    "wide": {**SIZES, "head_dim": sized(128, 16)},
    "value narrower": {**SIZES, "value_dim": sized(40, 7)},
    "many clusters": {**SIZES, "num_q_clusters": sized(30, 4), "num_k_clusters": sized(200, 9)},
}


def check(case: FirstOrder, device: torch.device) -> None:
    precise = case.problem.query.dtype == torch.float32
    log_mass, log_error = poisoned(device, ops.block_estimates, *moved(case.estimate_args, device))
    check_estimates(case, log_mass.cpu(), log_error.cpu(), mass_roundings=64.0 if precise else 64 * TF32 * 2**24)
    unit = 2.0**-22 if precise else 2 * TF32
    of_all = poisoned(device, ops.first_order_estimates, *moved(case.estimate_args, device))[2]
    check_residual(case, of_all.cpu(), case.residual_of_all, unit)
    residual, slope = poisoned(device, ops.first_order_terms, *moved(case.term_args, device))
    check_terms(case, residual.cpu(), slope.cpu(), unit)
    exact, exact_lse, _ = attention_answers(case)
    eager, _ = reference.first_order_attention(*case.attention_args, compute_dtype=case.problem.query.dtype)
    out, lse = poisoned(device, ops.first_order_attention, *moved(case.attention_args, device))
    assert_within_budget(out.cpu(), exact, eager, roundings=score_slack(case.problem))
    assert torch.equal(lse.cpu().isfinite(), exact_lse.isfinite())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    check(FirstOrder.of(make_problem(**SHAPES[shape], dtype=dtype)), device)


@pytest.mark.parametrize("input_scale", [1.0, 4.0])
def test_input_scales(input_scale: float, device: torch.device) -> None:
    check(FirstOrder.of(make_problem(**SIZES, input_scale=input_scale)), device)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_the_pool_is_the_oracles_and_the_same_every_time(density: float, device: torch.device) -> None:
    case = FirstOrder.of(make_problem(**SHAPES["many clusters"], q_heads=4, kv_heads=2))
    args = case.select_args(density)
    actual = poisoned(device, ops.select_blocks_of_layer, *moved(args, device))
    expected = reference.select_blocks_of_layer(*args, compute_dtype=F64)
    assert int((actual.cpu() != expected).sum()) <= 2
    assert torch.equal(poisoned(device, ops.select_blocks_of_layer, *moved(args, device)), actual)


def test_variances(device: torch.device) -> None:
    case = FirstOrder.of(make_problem(**SIZES))
    count = case.problem.query.shape[2]
    order = torch.arange(count, dtype=torch.int32).expand(1, 2, count).contiguous()
    args = (case.problem.query, order, case.problem.q_offsets, case.q_centroids)
    actual = poisoned(device, ops.cluster_variances, *moved(args, device))
    torch.testing.assert_close(actual.cpu(), case.q_variances, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_farthest_members(count: int, dtype: torch.dtype, device: torch.device) -> None:
    case = FirstOrder.of(make_problem(**SIZES, dtype=dtype))
    tokens = case.problem.query.shape[2]
    order = torch.arange(tokens, dtype=torch.int32).expand(1, 2, tokens).contiguous()
    args = (case.problem.query, order, case.problem.q_offsets, case.q_centroids, count)
    actual = poisoned(device, ops.farthest_members, *moved(args, device))
    torch.testing.assert_close(actual.cpu(), reference.farthest_members(*args, compute_dtype=F64))
