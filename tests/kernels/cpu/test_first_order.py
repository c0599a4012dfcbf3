"""First-order compensation on the CPU against the oracle in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.cpu import first_order as cpu_first_order
from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.tuning.lookup import override
from tests.kernels.first_order_cases import F64, SHAPES, attention_answers, check_estimates, check_residual, check_terms
from tests.kernels.helpers import FirstOrder, assert_within_budget, make_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_attention(cpu: ModuleType, case: FirstOrder) -> None:
    exact_out, exact_lse, eager = attention_answers(case)
    out, lse = cpu.first_order_attention(*case.attention_args)
    assert (out.dtype, lse.dtype) == (case.problem.query.dtype, torch.float32)
    assert out.is_contiguous()
    assert_within_budget(out, exact_out, eager)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    finite = exact_lse > -math.inf
    assert_within_budget(lse[finite], exact_lse[finite].double(), roundings=64)


def check_all(cpu: ModuleType, case: FirstOrder) -> None:
    estimates = cpu.block_estimates(*case.estimate_args)
    check_estimates(case, *estimates)
    *same, of_all = cpu.first_order_estimates(*case.estimate_args)
    torch.testing.assert_close(tuple(same), estimates, rtol=0, atol=0, equal_nan=True)
    check_residual(case, of_all, case.residual_of_all)
    check_terms(case, *cpu.first_order_terms(*case.term_args))
    # A row is taken off what all clusters leave out if it skips a 64th of its mass or more.
    residual, slope = cpu.first_order_terms(*(*case.term_args, of_all))
    check_terms(case, residual, slope, unit=64 * 2.0**-24)
    check_attention(cpu, case)


@pytest.mark.parametrize("name", SHAPES)
def test_every_op_over_shapes(cpu: ModuleType, name: str) -> None:
    case = FirstOrder.of(make_problem(**SHAPES[name]))
    check_all(cpu, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_scale", [1.0, 4.0, 16.0])
def test_every_op_over_dtypes_and_input_scales(cpu: ModuleType, dtype: torch.dtype, input_scale: float) -> None:
    case = FirstOrder.of(make_problem(dtype=dtype, input_scale=input_scale, num_keys=700))
    check_all(cpu, case)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    num_queries=st.integers(1, 150),
    num_keys=st.integers(1, 600),
    head_dim=st.integers(1, 40),
    num_q_clusters=st.integers(1, 9),
    num_k_clusters=st.integers(1, 20),
    keep=st.sampled_from([0.0, 0.02, 0.3, 1.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_op_over_random_problems(cpu: ModuleType, kv_heads: int, group: int, **shape: Any) -> None:
    case = FirstOrder.of(make_problem(kv_heads=kv_heads, q_heads=kv_heads * group, **shape))
    check_all(cpu, case)


def test_tiles_do_not_show(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FirstOrder.of(make_problem(batch=2, q_heads=4, kv_heads=2, num_queries=400, num_keys=500, num_k_clusters=30))
    whole = cpu.first_order_attention(*case.attention_args), cpu.first_order_terms(*case.term_args)
    estimates = cpu.block_estimates(*case.estimate_args)
    monkeypatch.setattr(cpu_first_order, "SCORES_PER_TILE", 1)
    in_tiles = cpu.first_order_attention(*case.attention_args), cpu.first_order_terms(*case.term_args)
    torch.testing.assert_close(in_tiles, whole, rtol=1e-5, atol=1e-6)
    with override("cpu_error", {"ERRORS_PER_TILE": 35}):
        torch.testing.assert_close(cpu.block_estimates(*case.estimate_args), estimates, rtol=1e-5, atol=1e-5)


def test_tokens_in_token_order_give_the_same(cpu: ModuleType) -> None:
    case = FirstOrder.of(make_problem(q_heads=4, kv_heads=2))
    generator = torch.Generator().manual_seed(0)
    orders = [
        torch.stack([torch.randperm(n, generator=generator) for _ in range(h)])[None] for h, n in ((4, 130), (2, 170))
    ]
    q_order, k_order = (order.to(torch.int32) for order in orders)
    args = list(case.attention_args)
    args[0], args[1], args[2] = (
        reference.unpermute_tokens(x, order) for x, order in zip(args[:3], (q_order, k_order, k_order), strict=True)
    )
    args += [q_order, k_order]
    out, lse = cpu.first_order_attention(*args)
    expected, expected_lse = cpu.first_order_attention(*case.attention_args)
    torch.testing.assert_close(reference.permute_tokens(out, q_order), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.gather(2, q_order.long()), expected_lse, rtol=0, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


def test_one_giant_cluster_beside_empty_ones(cpu: ModuleType) -> None:
    problem = make_problem(num_keys=900, num_k_clusters=6, num_queries=500, num_q_clusters=5)
    problem.k_offsets[:] = torch.tensor([0, 0, 880, 880, 883, 883, 883, 895, 900], dtype=torch.int32)
    problem.q_offsets[:] = torch.tensor([0, 0, 0, 499, 499, 500, 500, 500], dtype=torch.int32)
    means = [reference.cluster_means(x, problem.k_offsets) for x in (problem.key, problem.value)]
    problem = dataclasses.replace(problem, k_centroids=means[0], v_centroids=means[1])
    problem.k_centroids[..., 0, :] = math.nan  # an empty cluster's centroid may be anything
    case = FirstOrder.of(problem)
    check_all(cpu, case)


def test_masked_garbage_is_never_read(cpu: ModuleType) -> None:
    problem = make_problem(num_keys=300)
    case = FirstOrder.of(problem)
    clean = cpu.block_estimates(*case.estimate_args), cpu.first_order_terms(*case.term_args)
    attended = cpu.first_order_attention(*case.attention_args)
    for h in (0, 1):
        problem.key[0, h, int(problem.k_offsets[0, h, -2]) :] = math.nan
        problem.value[0, h, int(problem.k_offsets[0, h, -2]) :] = math.nan
    assert bool(problem.key.isnan().any())
    again = cpu.block_estimates(*case.estimate_args), cpu.first_order_terms(*case.term_args)
    torch.testing.assert_close(again, clean, rtol=0, atol=0)
    torch.testing.assert_close(cpu.first_order_attention(*case.attention_args), attended, rtol=0, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    num_keys=st.integers(5, 300),
    num_k_clusters=st.integers(1, 20),
    num_q_clusters=st.integers(1, 6),
    head_dim=st.integers(1, 24),
    input_scale=st.sampled_from([1.0, 4.0]),
    keep=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_at_their_centroid_queries_get_dense_attention(cpu: ModuleType, **shape: Any) -> None:
    """With what is computed here from end to end, in float32: nothing is lost in what is taken off."""
    problem = make_problem(num_queries=60, q_heads=2, kv_heads=1, **shape)
    problem.block_map[..., -2] = True  # the context is attended by everybody
    q_centroids = reference.cluster_means(problem.query, problem.q_offsets)
    for head in range(2):
        begins = problem.q_offsets[0, head].tolist()
        for i, (begin, end) in enumerate(itertools.pairwise(begins[:-2])):
            problem.query[0, head, begin:end] = q_centroids[0, head, i]
    means = (q_centroids, problem.k_centroids, problem.v_centroids)
    tokens = (problem.key, problem.value, problem.k_offsets)
    log_mass, _, of_all = cpu.first_order_estimates(*tokens, *means, problem.scale)
    terms = cpu.first_order_terms(*tokens, *means, log_mass, problem.block_map, problem.scale, of_all)
    out, _ = cpu.first_order_attention(*problem.args()[:7], *means, log_mass, *terms)
    slack = 32 * max(1.0, float(log_mass.abs().nan_to_num(0, 0, 0).max()))
    for head in range(2):
        end, clustered = int(problem.k_offsets[0, 0, -2]), slice(0, int(problem.q_offsets[0, head, -3]))
        key, value = problem.key[0, 0, :end].double(), problem.value[0, 0, :end].double()
        exact = torch.softmax(problem.scale * (problem.query[0, head, clustered].double() @ key.T), dim=-1) @ value
        assert_within_budget(out[0, head, clustered], exact, roundings=slack)


def clustered_at_random() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x that is not dense, with order, offsets and centroids of five clusters: one empty, and context around them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 90, 7, generator=generator).transpose(2, 3).contiguous().transpose(2, 3)
    labels = torch.randint(0, 5, (2, 3, 80), generator=generator, dtype=torch.int32)
    labels[labels == 3] = 4
    return x, *reference.cluster_order(labels, 5, 6, 90), torch.randn(2, 3, 5, 7, generator=generator)


def test_variances_equal_the_oracle(cpu: ModuleType) -> None:
    x, *clusters = clustered_at_random()
    for dtype in DTYPES:
        actual = cpu.cluster_variances(x.to(dtype), *clusters)
        exact = reference.cluster_variances(x.to(dtype), *clusters, compute_dtype=F64)
        torch.testing.assert_close(actual, exact)
        assert not bool(actual[:, :, 3].any())


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_farthest_members_are_the_oracles(cpu: ModuleType, count: int) -> None:
    x, order, offsets, centroids = clustered_at_random()
    for dtype in DTYPES:
        actual = cpu.farthest_members(x.to(dtype), order, offsets, centroids, count)
        exact = reference.farthest_members(x.to(dtype), order, offsets, centroids, count, compute_dtype=F64)
        torch.testing.assert_close(actual, exact)
        assert bool(actual[:, :, 4, 0].any()) and not bool(actual[:, :, 3].any())


def test_of_equally_far_members_the_first_and_none_beyond_the_last(cpu: ModuleType) -> None:
    x, order = torch.tensor([1.0, -1.0, 2.0, 1.0])[:, None].expand(1, 1, 4, 2), torch.arange(4, dtype=torch.int32)
    offsets = torch.tensor([0, 4, 4, 4, 4], dtype=torch.int32).expand(1, 1, 5)
    kept = cpu.farthest_members(x, order.expand(1, 1, 4), offsets, torch.zeros(1, 1, 2, 2), 5)
    assert kept[0, 0, :, :, 0].tolist() == [[2.0, 1.0, -1.0, 1.0, 0.0], [0.0] * 5]
