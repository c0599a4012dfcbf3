"""Block selection on the CPU against the oracle in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels.cpu import implementation as cpu
from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.tuning.lookup import override
from tests.kernels.helpers import make_problem

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_selection(seed: int, q_heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    num_q, num_k = int(torch.randint(1, 9, ())), int(torch.randint(1, 30, ()))
    q_sizes = torch.randint(0, 9, (2, q_heads, num_q), dtype=torch.int32)
    k_sizes = torch.randint(0, 9, (2, kv_heads, num_k), dtype=torch.int32)
    return torch.randn(2, q_heads, num_q, 8), torch.randn(2, kv_heads, num_k, 8), q_sizes, k_sizes


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    top_p=st.floats(0.0, 1.2),
    min_k_ratio=st.floats(0.0, 1.0),
    density=st.none() | st.floats(0.0, 1.0),
)
def test_selection_equals_the_oracle(seed: int, top_p: float, min_k_ratio: float, density: float | None) -> None:
    inputs = random_selection(seed)
    actual = cpu.select_blocks(*inputs, 0.7, top_p, min_k_ratio, density)
    expected = reference.select_blocks(*inputs, 0.7, top_p, min_k_ratio, density, compute_dtype=F64)
    # Rounding may move one borderline cluster of a row, never more.
    assert int((actual != expected).sum(dim=-1).max()) <= 1
    assert (actual != expected).float().mean() < 0.01
    num_q, num_k = inputs[0].shape[2], inputs[1].shape[2]
    k_sizes = inputs[3].repeat_interleave(2, dim=1).unsqueeze(2)
    nonempty_kept = (actual[..., :num_q, :num_k] & (k_sizes > 0)).any(dim=-1)
    assert torch.equal(nonempty_kept, (k_sizes > 0).any(dim=-1).expand_as(nonempty_kept))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_with_broken_scores_keep_everything(bad: float) -> None:
    for implementation in (cpu, reference):
        q, k, q_sizes, k_sizes = random_selection(3)
        k_sizes.clamp_(min=1)
        q[0, 1, 0, 2] = bad
        block_map = implementation.select_blocks(q, k, q_sizes, k_sizes, 0.7, 0.2, 0.0)
        assert bool(block_map[0, 1, 0, :-1].all())
        assert not bool(block_map[1, 1, 0, :-1].all())
        k[1, 0, 0, 1] = bad
        block_map = implementation.select_blocks(q, k, q_sizes, k_sizes, 0.7, 0.2, 0.0)
        assert bool(block_map[1, :2, :-1, :-1].all())
        k_sizes[1, 0, 0] = 0  # an empty cluster's centroid says nothing
        block_map = implementation.select_blocks(q, k, q_sizes, k_sizes, 0.7, 0.2, 0.0)
        assert not bool(block_map[1, :2, 0, :-1].all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("input_scale", [1.0, 4.0, 16.0])
def test_selection_by_error_equals_the_oracle(dtype: torch.dtype, density: float | None, input_scale: float) -> None:
    problem = make_problem(q_heads=4, kv_heads=2, num_keys=300, num_k_clusters=15, dtype=dtype, input_scale=input_scale)
    q_centroids = input_scale * torch.randn(1, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    q_sizes = torch.ones(1, 4, 5, dtype=torch.int32)
    tokens = (problem.key, problem.value, problem.k_offsets)
    means = (q_centroids, problem.k_centroids, problem.v_centroids, q_sizes)
    limits: tuple[Any, ...] = (problem.scale, 0.7, 0.1, density)
    actual = cpu.select_blocks_by_error(*tokens, *means, *limits)
    expected = reference.select_blocks_by_error(*tokens, *means, *limits, compute_dtype=F64)
    # Two blocks of nearly the same error may change places at the edge of the budget.
    assert (actual != expected).float().mean() < 0.01
    if density == 1.0:
        assert bool(actual[..., :5, :-1].all())


def test_selection_by_error_in_tiles() -> None:
    problem = make_problem(num_keys=300, num_k_clusters=15)
    q_centroids = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    q_sizes = torch.ones(1, 2, 5, dtype=torch.int32)
    args = (problem.key, problem.value, problem.k_offsets, q_centroids, problem.k_centroids, problem.v_centroids)
    whole = cpu.select_blocks_by_error(*args, q_sizes, problem.scale, 0.7, 0.0)
    with override("cpu_error", {"ERRORS_PER_TILE": 35}):  # 7 tokens at a time, across cluster boundaries
        assert torch.equal(cpu.select_blocks_by_error(*args, q_sizes, problem.scale, 0.7, 0.0), whole)
