"""Block selection in Triton against the oracle: by mass, by fixed density, by error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from tests.gpu.support import moved, poisoned, sized
from tests.kernels.helpers import SELECTION_LIMITS, make_problem

# Two clusters of nearly the same rank may change places at the edge of the budget.
MISMATCHES = 0.002
SCALE = 0.125


def centroids_and_sizes(num_k: int, num_q: int = 7, spread: float = 2.0) -> tuple[Any, ...]:
    """Centroids [2, H, C, 64] and sizes of queries and keys, some keys' clusters empty; the scale."""
    generator = torch.Generator().manual_seed(0)
    q = spread * torch.randn(2, 4, num_q, 64, generator=generator)
    k = spread * torch.randn(2, 2, num_k, 64, generator=generator)
    k_sizes = torch.randint(0, 200, (2, 2, num_k), generator=generator, dtype=torch.int32)
    k_sizes[..., ::5] = 0
    return q, k, torch.ones(2, 4, num_q, dtype=torch.int32), k_sizes, SCALE


def check(actual: Tensor, expected: Tensor) -> None:
    actual = actual.cpu()
    assert float((actual != expected).float().mean()) <= MISMATCHES
    assert torch.equal(actual[..., -2:, :], expected[..., -2:, :])  # rows of context and masked tokens
    assert torch.equal(actual[..., -2:], expected[..., -2:])  # their columns
    assert torch.equal(actual.any(dim=-1), expected.any(dim=-1))


@pytest.mark.parametrize("limits", SELECTION_LIMITS)
@pytest.mark.parametrize("num_k", [1, 21, sized(1000, 64), sized(2500, 130)])
def test_by_mass(limits: str, num_k: int, device: torch.device) -> None:
    args = centroids_and_sizes(num_k, num_q=sized(60, 3))
    actual = poisoned(device, ops.select_blocks, *moved(args, device), **SELECTION_LIMITS[limits])
    check(actual, reference.select_blocks(*args, **SELECTION_LIMITS[limits]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 16.0])
def test_by_mass_over_scales(spread: float, device: torch.device) -> None:
    args = centroids_and_sizes(sized(500, 40), spread=spread)
    for limits in (SELECTION_LIMITS["top_p"], SELECTION_LIMITS["density"]):
        actual = poisoned(device, ops.select_blocks, *moved(args, device), **limits)
        # In float32, as the op: masses below its range are ties, which the index breaks.
        check(actual, reference.select_blocks(*args, **limits))


@pytest.mark.parametrize("limits", SELECTION_LIMITS)
def test_ties_are_broken_by_index(limits: str, device: torch.device) -> None:
    q, k, q_sizes, k_sizes, _ = centroids_and_sizes(21)
    k[:] = k[:, :, :1]  # all clusters alike: only sizes and places differ
    k_sizes[:] = torch.tensor([3, 0, 3, 7, 3, 3, 7] * 3, dtype=torch.int32)
    args = (q, k, q_sizes, k_sizes, SCALE)
    actual = poisoned(device, ops.select_blocks, *moved(args, device), **SELECTION_LIMITS[limits])
    assert torch.equal(actual.cpu(), reference.select_blocks(*args, **SELECTION_LIMITS[limits]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_keeps_everything(value: float, device: torch.device) -> None:
    q, k, q_sizes, k_sizes, _ = centroids_and_sizes(50)
    q[0, 1, 2, 0] = value
    args = (q, k, q_sizes, k_sizes, SCALE)
    actual = poisoned(device, ops.select_blocks, *moved(args, device), 0.5, 0.0).cpu()
    check(actual, reference.select_blocks(*args, 0.5, 0.0))
    assert bool(actual[0, 1, 2, :-1].all())


def test_no_keys_at_all(device: torch.device) -> None:
    q, k, q_sizes, k_sizes, _ = centroids_and_sizes(50)
    k_sizes[1] = 0
    args = (q, k, q_sizes, k_sizes, SCALE)
    actual = poisoned(device, ops.select_blocks, *moved(args, device), 0.8, 0.1)
    check(actual, reference.select_blocks(*args, 0.8, 0.1))


def error_arguments(dtype: torch.dtype, head_dim: int, input_scale: float) -> tuple[Any, ...]:
    sizes: dict[str, Any] = {"num_keys": sized(1200, 150), "num_k_clusters": sized(60, 9)}
    tokens: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "input_scale": input_scale}
    problem = make_problem(batch=2, q_heads=4, kv_heads=2, **sizes, **tokens)
    generator = torch.Generator().manual_seed(0)
    q_centroids = input_scale * torch.randn(2, 4, sized(20, 5), head_dim, generator=generator)
    q_sizes = torch.ones(q_centroids.shape[:3], dtype=torch.int32)
    means = (q_centroids, problem.k_centroids, problem.v_centroids, q_sizes)
    return (problem.key, problem.value, problem.k_offsets, *means, problem.scale)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 72), (torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64)],
)
@pytest.mark.parametrize("limits", ["top_p", "at least half", "everything", "density", "density zero"])
def test_by_error(limits: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    args = error_arguments(dtype, head_dim, 1.0)
    actual = poisoned(device, ops.select_blocks_by_error, *moved(args, device), **SELECTION_LIMITS[limits]).cpu()
    expected = reference.select_blocks_by_error(*args, **SELECTION_LIMITS[limits], compute_dtype=torch.float64)
    # The estimate multiplies in the tokens' dtype, so ranks that are close differ more often than those by mass.
    allowed = 0.01 if dtype == torch.float32 else 0.05
    assert float((actual != expected).float().mean()) <= allowed
    assert torch.equal(actual.any(dim=-1), expected.any(dim=-1))


@pytest.mark.parametrize("input_scale", [4.0, 16.0])
def test_by_error_over_scales_keeps_as_many_keys(input_scale: float, device: torch.device) -> None:
    args = error_arguments(torch.bfloat16, 64, input_scale)
    actual = poisoned(device, ops.select_blocks_by_error, *moved(args, device), **SELECTION_LIMITS["density"]).cpu()
    expected = reference.select_blocks_by_error(*args, **SELECTION_LIMITS["density"], compute_dtype=torch.float64)
    sizes = args[2].diff(dim=-1)[..., :-2].repeat_interleave(2, dim=1).unsqueeze(2)
    kept = [(block_map[..., :-2, :-2] * sizes).sum(dim=-1) for block_map in (actual, expected)]
    assert bool(((kept[0] - kept[1]).abs() <= sizes.amax(dim=-1)).all())


def test_nan_in_a_value_keeps_every_block_of_its_heads(device: torch.device) -> None:
    args = error_arguments(torch.bfloat16, 64, 1.0)
    args[1][0, 1, 3, 0] = math.nan
    actual = poisoned(device, ops.select_blocks_by_error, *moved(args, device), 0.6, 0.0).cpu()
    num_q_clusters = args[3].shape[2]
    block = int(torch.searchsorted(args[2][0, 1, 1:].contiguous(), 3, right=True))
    assert block < args[4].shape[2], "the broken token must be in a cluster"
    assert bool(actual[0, 2:, :num_q_clusters, :-1].all())
