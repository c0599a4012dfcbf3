"""Block-sparse attention in Triton against the oracle in float64: odd shapes, dtypes, scales, masks, orders, passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.triton import attention, implementation
from svg2_compile.kernels.triton.workspace import Workspace
from svg2_compile.kernels.tuning.lookup import override
from tests.kernels.helpers import Problem, assert_within_budget, make_problem

F64 = torch.float64
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"num_queries": 45, "num_keys": 70},
    "one token": {"num_queries": 1, "num_keys": 1, "num_q_clusters": 1, "num_k_clusters": 1, "keep": 1.0},
    "grouped heads, batch 2": {"batch": 2, "q_heads": 4, "kv_heads": 2, "num_queries": 33, "num_keys": 40},
    "odd head_dim": {"head_dim": 19, "num_queries": 40, "num_keys": 50},
    "value wider": {"head_dim": 8, "value_dim": 24, "num_queries": 40, "num_keys": 50},
    "value narrower": {"head_dim": 24, "value_dim": 7, "num_queries": 40, "num_keys": 50},
    "one cluster": {"num_q_clusters": 1, "num_k_clusters": 1, "num_queries": 70, "num_keys": 33},
    "full tiles": {"num_queries": 64, "num_keys": 128, "keep": 1.1, "q_heads": 1, "kv_heads": 1},
    "few keys kept": {"keep": 0.05, "num_queries": 40, "num_keys": 90},
    "nothing kept": {"keep": 0.0, "num_queries": 20, "num_keys": 30},
    "no keys": {"num_keys": 0},
    "no queries": {"num_queries": 0},
    "no batch": {"batch": 0},
}


def to_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check(problem: Problem, compensation: bool) -> None:
    args = problem.args(compensation)
    exact, exact_lse = reference.block_sparse_attention(*to_double(args), compute_dtype=F64)
    eager, _ = reference.block_sparse_attention(*args, compute_dtype=problem.query.dtype)
    out, lse = implementation.block_sparse_attention(*args)
    assert out.dtype == problem.query.dtype and out.is_contiguous()
    assert_within_budget(out, exact, eager)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    finite = exact_lse.isfinite()
    tolerance = 2e-2 if problem.query.dtype != torch.float32 else 2e-5
    torch.testing.assert_close(lse[finite], exact_lse[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, compensation: bool) -> None:
    check(make_problem(**SHAPES[shape]), compensation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compensation", [False, True])
def test_low_precision(dtype: torch.dtype, compensation: bool) -> None:
    check(make_problem(dtype=dtype, num_queries=40, num_keys=90, head_dim=32), compensation)


@pytest.mark.parametrize("input_scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_scales(input_scale: float, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, input_scale=input_scale, num_queries=33, num_keys=60, q_heads=1, kv_heads=1)
    check(problem, compensation=False)


def giant_and_empty_clusters() -> Problem:
    """One key cluster holds nearly all keys, some hold one, most none; the same for queries."""
    problem = make_problem(num_queries=60, num_keys=150, num_q_clusters=4, num_k_clusters=9, q_heads=1, kv_heads=1)
    q_offsets = torch.tensor([[[0, 0, 57, 57, 58, 60, 60]]], dtype=torch.int32)
    k_offsets = torch.tensor([[[0, 0, 1, 140, 140, 140, 141, 141, 142, 142, 147, 150]]], dtype=torch.int32)
    means = (reference.cluster_means(problem.key, k_offsets), reference.cluster_means(problem.value, k_offsets))
    block_map = problem.block_map.clone()
    block_map[..., 2] = torch.tensor([True, True, False, True, False, True])
    changes = {"q_offsets": q_offsets, "k_offsets": k_offsets, "k_centroids": means[0], "v_centroids": means[1]}
    return Problem(**{**problem.__dict__, **changes, "block_map": block_map})


@pytest.mark.parametrize("compensation", [False, True])
def test_giant_and_empty_clusters(compensation: bool) -> None:
    check(giant_and_empty_clusters(), compensation)


@pytest.mark.parametrize("compensation", [False, True])
def test_orders_are_followed(compensation: bool) -> None:
    problem = make_problem(batch=2, q_heads=4, kv_heads=2, num_queries=37, num_keys=50)
    generator = torch.Generator().manual_seed(1)
    q_order = torch.argsort(torch.rand(2, 4, 37, generator=generator), dim=-1).to(torch.int32)
    k_order = torch.argsort(torch.rand(2, 2, 50, generator=generator), dim=-1).to(torch.int32)
    args = problem.args(compensation)
    tokens = [reference.unpermute_tokens(problem.query, q_order)]
    tokens += [reference.unpermute_tokens(x, k_order) for x in (problem.key, problem.value)]
    unpermuted: tuple[Any, ...] = (*tokens, *args[3:], q_order, k_order)
    permuted, permuted_lse = implementation.block_sparse_attention(*args)
    out, lse = implementation.block_sparse_attention(*unpermuted)
    assert torch.equal(out, reference.unpermute_tokens(permuted, q_order))
    assert out.stride() == reference.unpermute_tokens(permuted, q_order).stride()
    assert torch.equal(lse, torch.empty_like(lse).scatter_(2, q_order.long(), permuted_lse))
    expected, expected_lse = reference.block_sparse_attention(*unpermuted)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_many_passes_and_chunks_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, groups: int, compensation: bool
) -> None:
    problem = make_problem(q_heads=4, kv_heads=2, num_queries=60, num_keys=90, num_q_clusters=6)
    args = problem.args(compensation)
    whole = implementation.block_sparse_attention(*args)
    longest, rows = 90 + (11 if compensation else 0), 8
    capacity = 100
    passes = math.ceil(groups * rows * longest / capacity)

    def cramped(self: attention.AttentionWork, block_m: int, limit_bytes: int) -> Workspace:
        return Workspace(groups, capacity + longest + 256, capacity, passes, 0)

    monkeypatch.setattr(attention.AttentionWork, "space", cramped)
    assert passes > 3
    for expected, actual in zip(whole, implementation.block_sparse_attention(*args), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_tile_sizes_change_nothing_but_rounding(block_m: int, block_n: int) -> None:
    problem = make_problem(num_queries=50, num_keys=100)
    expected = reference.block_sparse_attention(*problem.args(True))
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2, "PROGRAMS_PER_SM": 1}
    with override("attention", sizes):
        actual = implementation.block_sparse_attention(*problem.args(True))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    problem = make_problem(num_queries=40, num_keys=70)
    check(Problem(**{**problem.__dict__, "scale": scale}), compensation=True)


def test_nan_reaches_exactly_the_rows_that_see_it() -> None:
    problem = make_problem(num_queries=60, num_keys=80, q_heads=1, kv_heads=1)
    problem.value[0, 0, 0, 3] = math.nan  # key 0 is what carelessly padded lists would name
    problem.key[0, 0, 41, 2] = math.nan
    problem.query[0, 0, 7, 1] = math.nan
    expected, _ = reference.block_sparse_attention(*problem.args())
    actual, _ = implementation.block_sparse_attention(*problem.args())
    assert bool(expected.isnan().any()) and not bool(expected.isnan().all())
    assert torch.equal(actual.isnan(), expected.isnan())


def test_strided_inputs_and_the_op() -> None:
    problem = make_problem(batch=2, num_queries=40, num_keys=40)
    args = problem.args()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
    with ops.use_implementation("triton"):
        out, lse = ops.block_sparse_attention(*strided, *args[3:])
    expected = implementation.block_sparse_attention(*args)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_a_workspace_that_is_too_small_is_an_error() -> None:
    problem = make_problem(num_queries=10, num_keys=200_000, head_dim=1, q_heads=1, kv_heads=1)
    args: list[Any] = [*problem.args(), None, None, 1]
    with pytest.raises(ValueError, match=r"workspace_mb is 1; valid here: at least 3 "):
        implementation.block_sparse_attention(*args)


def test_a_head_that_is_too_wide_is_an_error() -> None:
    problem = make_problem(num_queries=10, num_keys=10, head_dim=257)
    with pytest.raises(ValueError, match=r"head_dim is 257; valid for the Triton kernels: at most 256"):
        implementation.block_sparse_attention(*problem.args())


def test_block_density_equals_the_oracle() -> None:
    problem = make_problem(batch=2, q_heads=4, kv_heads=2)
    args = (problem.q_offsets, problem.k_offsets, problem.block_map)
    torch.testing.assert_close(implementation.block_density(*args), reference.block_density(*args))
    nothing = make_problem(num_queries=0, num_keys=0)
    empty = (nothing.q_offsets, nothing.k_offsets, nothing.block_map)
    assert torch.equal(implementation.block_density(*empty), torch.zeros(1, 2))
