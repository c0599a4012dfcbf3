"""The oracle's first-order compensation against its formulas, and what it promises: exact at centroids, dense if all is
selected."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.first_order_cases import F64
from tests.kernels.helpers import FirstOrder, Problem, assert_within_budget, make_problem


def dense(problem: Problem, query: Tensor, head: int) -> Tensor:
    """Exact attention of query [n, D] of one head over all keys but masked ones, in float64."""
    end = int(problem.k_offsets[0, head, -2])
    key, value = problem.key[0, head, :end].double(), problem.value[0, head, :end].double()
    return torch.softmax(problem.scale * (query.double() @ key.T), dim=-1) @ value


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    num_keys=st.integers(5, 300),
    num_k_clusters=st.integers(1, 20),
    num_q_clusters=st.integers(1, 6),
    head_dim=st.integers(1, 24),
    input_scale=st.sampled_from([1.0, 4.0, 16.0]),
    keep=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_query_at_its_centroid_is_exact_whatever_is_skipped(**shape: Any) -> None:
    """Every query is put where its cluster's centroid is: compensated attention is dense attention."""
    problem = make_problem(num_queries=60, q_heads=1, kv_heads=1, **shape)
    problem.block_map[..., -2] = True  # the context is attended by everybody
    means = reference.cluster_means(problem.query, problem.q_offsets)
    begins = problem.q_offsets[0, 0].tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(begins[:-2])):
        problem.query[0, 0, begin:end] = means[0, 0, i]
    case = FirstOrder.of(problem)
    out, _ = reference.first_order_attention(*case.attention_args, compute_dtype=F64)
    clustered = slice(0, begins[-3])
    exact = dense(problem, problem.query[0, 0, clustered], 0)
    # Masses are handed over in float32: a logit of 16 * 16 has three digits before the point.
    assert_within_budget(
        out[0, 0, clustered], exact, roundings=32 * max(1.0, float(case.log_mass.abs().nan_to_num(0, 0).max()))
    )


def test_first_order_means_that_the_error_falls_with_the_square_of_the_distance() -> None:
    """Of one cluster of keys whose values are linear in the keys, the slope is the derivative of the output."""
    generator = torch.Generator().manual_seed(0)
    key = 0.05 * torch.randn(1, 1, 4000, 4, generator=generator)
    key -= key.mean(dim=2, keepdim=True)
    value = key @ torch.randn(4, 3, generator=generator)
    offsets = torch.tensor([[[0, 4000, 4000, 4000]]], dtype=torch.int32)
    block_map = torch.tensor([[False, True, False]] * 3).view(1, 1, 3, 3)
    centroid = torch.zeros(1, 1, 1, 4)
    errors = []
    for distance in (0.5, 1.0):
        query = distance * torch.nn.functional.normalize(torch.randn(1, 1, 8, 4, generator=generator), dim=-1)
        q_offsets = torch.tensor([[[0, 8, 8, 8]]], dtype=torch.int32)
        problem = Problem(
            query, key, value, q_offsets, offsets, block_map, 1.0, *(key[:, :, :1] * 0, value[:, :, :1] * 0)
        )
        problem.v_centroids[0, 0, 0] = value[0, 0].mean(dim=0)
        of_centroid = FirstOrder.of(dataclasses.replace(problem, query=query * 0))
        case = dataclasses.replace(of_centroid, problem=problem)
        assert torch.equal(case.q_centroids, centroid)
        out, _ = reference.first_order_attention(*case.attention_args, compute_dtype=F64)
        exact = dense(problem, query[0, 0], 0)
        errors.append(float((out[0, 0] - exact).norm() / exact.norm()))
    assert errors[0] < 0.01  # without the slope it would be 1
    assert errors[1] < 6 * errors[0]


def test_estimates_terms_and_variances_by_their_formulas() -> None:
    problem = make_problem(q_heads=2, kv_heads=1, num_keys=50, num_k_clusters=4, value_dim=3)
    case = FirstOrder.of(problem)
    key, value = problem.key[0, 0].double(), problem.value[0, 0].double()
    bounds = problem.k_offsets[0, 0].tolist()
    for h in range(2):
        weights = torch.exp(problem.scale * (case.q_centroids[0, h].double() @ key.T))
        for i in range(4):
            numerator, mass = torch.zeros(3, dtype=F64), 0.0
            for j in range(5):
                block = weights[i, bounds[j] : bounds[j + 1]]
                expected = float(block.sum().log())
                assert float(case.log_mass[0, h, i, j]) == pytest.approx(expected, rel=1e-6)
                if j < 4 and block.numel() and not problem.block_map[0, h, i, j]:
                    away = value[bounds[j] : bounds[j + 1]] - problem.v_centroids[0, 0, j].double()
                    numerator, mass = numerator + block @ away, mass + float(block.sum())
            assert bool((case.log_mass[0, h, i, 5] == -math.inf).all())
            torch.testing.assert_close(
                case.residual[0, h, i].double(), numerator / max(mass, 1e-30), rtol=1e-5, atol=1e-7
            )
    slope = torch.zeros(16, 3, dtype=F64)
    for j in range(4):
        run = slice(bounds[j], bounds[j + 1])
        key_away = key[run] - problem.k_centroids[0, 0, j]
        slope += problem.scale * key_away.T @ (value[run] - problem.v_centroids[0, 0, j].double()) / bounds[4]
    torch.testing.assert_close(case.slope[0, 0].double(), slope, rtol=1e-5, atol=1e-7)
    variances = reference.cluster_variances(
        problem.query, torch.arange(130, dtype=torch.int32).expand(1, 2, 130), problem.q_offsets, case.q_centroids
    )
    torch.testing.assert_close(variances, case.q_variances, rtol=1e-3, atol=1e-4)


def test_nothing_is_added_where_nothing_is_skipped() -> None:
    """A cluster with a NaN residual and slope: its rows that skip nothing do not see it."""
    problem = make_problem(keep=1.1)
    case = FirstOrder.of(problem)
    assert not bool(case.residual.any())
    broken = dataclasses.replace(case, residual=case.residual * math.nan, slope=case.slope * math.nan)
    out, _ = reference.first_order_attention(*broken.attention_args)
    expected, _ = reference.block_sparse_attention(*problem.args())
    torch.testing.assert_close(out, expected)
