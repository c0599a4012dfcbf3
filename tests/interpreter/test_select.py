"""Block selection in Triton against the oracle: by mass, by fixed density, by error; ties, empty clusters, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.reference.select import log_errors as exact_log_errors
from svg2_compile.kernels.triton import implementation, launch
from svg2_compile.kernels.triton.error import error_inputs, log_errors
from tests.kernels.helpers import SELECTION_LIMITS, make_problem

# As callables of anything: argument lists are built piece by piece below.
implementation_by_mass: Callable[..., Tensor] = implementation.select_blocks
implementation_by_error: Callable[..., Tensor] = implementation.select_blocks_by_error
reference_by_mass: Callable[..., Tensor] = reference.select_blocks
reference_by_error: Callable[..., Tensor] = reference.select_blocks_by_error


def centroids_and_sizes(num_k: int = 21, *, num_q: int = 3, heads: int = 2, kv_heads: int = 1) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2, heads, num_q, 12, generator=generator)
    k = 2 * torch.randn(2, kv_heads, num_k, 12, generator=generator)
    k_sizes = torch.randint(0, 40, (2, kv_heads, num_k), generator=generator, dtype=torch.int32)
    k_sizes[..., ::5] = 0
    return q, k, torch.ones(2, heads, num_q, dtype=torch.int32), k_sizes


@pytest.mark.parametrize("limits", SELECTION_LIMITS)
@pytest.mark.parametrize("num_k", [1, 21, 64])
def test_by_mass(limits: str, num_k: int) -> None:
    args = centroids_and_sizes(num_k=num_k)
    actual = implementation_by_mass(*args, scale=0.4, **SELECTION_LIMITS[limits])
    assert torch.equal(actual, reference_by_mass(*args, scale=0.4, **SELECTION_LIMITS[limits]))


@pytest.mark.parametrize("limits", SELECTION_LIMITS)
def test_ties_are_broken_by_index(limits: str) -> None:
    q, k, q_sizes, k_sizes = centroids_and_sizes()
    k[:] = k[:, :, :1]  # all clusters alike: only sizes and places differ
    k_sizes[:] = torch.tensor([3, 0, 3, 7, 3, 3, 7] * 3, dtype=torch.int32)
    actual = implementation_by_mass(q, k, q_sizes, k_sizes, 0.4, **SELECTION_LIMITS[limits])
    assert torch.equal(actual, reference_by_mass(q, k, q_sizes, k_sizes, 0.4, **SELECTION_LIMITS[limits]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_keeps_everything(value: float) -> None:
    q, k, q_sizes, k_sizes = centroids_and_sizes()
    q[0, 1, 2, 0] = value
    actual = implementation_by_mass(q, k, q_sizes, k_sizes, 0.4, 0.5, 0.0)
    assert torch.equal(actual, reference_by_mass(q, k, q_sizes, k_sizes, 0.4, 0.5, 0.0))
    assert bool(actual[0, 1, 2, :-1].all())


def test_no_keys_at_all_and_chunks_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, q_sizes, k_sizes = centroids_and_sizes()
    k_sizes[1] = 0
    expected = reference_by_mass(q, k, q_sizes, k_sizes, 0.4, 0.8, 0.1)
    assert torch.equal(implementation_by_mass(q, k, q_sizes, k_sizes, 0.4, 0.8, 0.1), expected)
    monkeypatch.setattr(launch, "SCORE_BYTES", 4 * 3 * 21 * 3)  # three heads at a time, of four
    assert torch.equal(implementation_by_mass(q, k, q_sizes, k_sizes, 0.4, 0.8, 0.1), expected)


def error_problem(dtype: torch.dtype = torch.float32, input_scale: float = 1.0):
    problem = make_problem(
        q_heads=4, kv_heads=2, num_keys=150, num_k_clusters=9, value_dim=20, dtype=dtype, input_scale=input_scale
    )
    q_centroids = input_scale * torch.randn(1, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    q_sizes = torch.ones(1, 4, 5, dtype=torch.int32)
    return problem, q_centroids, q_sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_scale", [1.0, 4.0])
def test_the_streamed_error_is_the_exact_one(dtype: torch.dtype, input_scale: float) -> None:
    problem, q_centroids, _ = error_problem(dtype, input_scale)
    tokens = (problem.key, problem.value, problem.k_offsets)
    exact = exact_log_errors(
        *tokens, q_centroids, problem.k_centroids, problem.v_centroids, problem.scale, torch.float64
    )
    k_centroids = problem.k_centroids.repeat_interleave(2, dim=1)
    logits = (q_centroids @ k_centroids.transpose(-1, -2)).flatten(0, 1)
    inputs = error_inputs(*tokens, problem.v_centroids)
    actual = log_errors(inputs, q_centroids, logits, problem.scale, slice(0, 4)).view(1, 4, 5, 9)
    filled = (problem.k_offsets.diff(dim=-1)[..., :9] > 0).repeat_interleave(2, dim=1).unsqueeze(2).expand(1, 4, 5, 9)
    # A cluster of one key has error 0, and a rounding error instead of it: compare where there is something to compare.
    large = filled & (exact > exact.amax(dim=-1, keepdim=True) - 12)
    torch.testing.assert_close(actual[large].double(), exact[large], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("limits", SELECTION_LIMITS)
def test_by_error(limits: str) -> None:
    problem, q_centroids, q_sizes = error_problem()
    args: tuple[Any, ...] = (problem.key, problem.value, problem.k_offsets, q_centroids)
    args += (problem.k_centroids, problem.v_centroids, q_sizes)
    actual = implementation_by_error(*args, scale=problem.scale, **SELECTION_LIMITS[limits])
    expected = reference_by_error(*args, scale=problem.scale, **SELECTION_LIMITS[limits])
    # Two blocks of nearly the same error may change places at the edge of the budget.
    assert float((actual != expected).float().mean()) <= 0.01


def test_nan_in_a_value_keeps_every_block_of_its_heads() -> None:
    problem, q_centroids, q_sizes = error_problem()
    problem.value[0, 1, 3, 0] = math.nan
    args: tuple[Any, ...] = (problem.key, problem.value, problem.k_offsets, q_centroids)
    args += (problem.k_centroids, problem.v_centroids, q_sizes)
    actual = implementation_by_error(*args, scale=problem.scale, top_p=0.6, min_k_ratio=0.0)
    expected = reference_by_error(*args, scale=problem.scale, top_p=0.6, min_k_ratio=0.0)
    assert torch.equal(actual[:, 2:], expected[:, 2:])
    assert bool(actual[0, 2:, :5, :-1].all())
