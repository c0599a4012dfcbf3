"""block_sparse_attention in Triton against the oracle in float64, on problems of every shape."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from tests.gpu.support import check_attention, moved, poisoned, sized, token_major
from tests.kernels.helpers import EDGE_SHAPES, Problem, make_problem

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_QUERIES, NUM_KEYS = sized(517, 45), sized(1031, 70)
SHAPES: dict[str, dict[str, Any]] = {
    **EDGE_SHAPES,
    "value wider": {"head_dim": 32, "value_dim": 96},
    "value narrower": {"head_dim": 128, "value_dim": 40},
    "whole tiles": {"num_queries": sized(512, 64), "num_keys": sized(1024, 128), "keep": 1.1},
    "many clusters": {"num_q_clusters": sized(60, 9), "num_k_clusters": sized(200, 20)},
}
# Every width in the dtype that models use; the others where padding and precision change the kernel.
WIDTHS = [(torch.bfloat16, width) for width in (32, 64, 72, 80, 96, 128, 200, 256)]
WIDTHS += [(dtype, width) for dtype in (torch.float16, torch.float32) for width in (64, 80, 128, 256)]


def problem(**changes: Any) -> Problem:
    return make_problem(
        **{"num_queries": NUM_QUERIES, "num_keys": NUM_KEYS, "head_dim": 64, "dtype": torch.bfloat16, **changes}
    )


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), WIDTHS, ids=lambda value: str(value).removeprefix("torch."))
def test_widths_and_dtypes(dtype: torch.dtype, head_dim: int, compensation: bool, device: torch.device) -> None:
    check_attention(problem(dtype=dtype, head_dim=head_dim), device, compensation)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, compensation: bool, device: torch.device) -> None:
    check_attention(problem(**SHAPES[name]), device, compensation)


@pytest.mark.parametrize("input_scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_scales(dtype: torch.dtype, input_scale: float, device: torch.device) -> None:
    for compensation in (False, True):
        check_attention(problem(dtype=dtype, input_scale=input_scale), device, compensation)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("shape", [{}, {"head_dim": 72, "dtype": torch.float16}, SHAPES["grouped heads, batch 2"]])
def test_tokens_in_token_order(shape: dict[str, Any], compensation: bool, device: torch.device) -> None:
    check_attention(problem(**shape), device, compensation, orders=True)


def giant_and_empty_clusters() -> Problem:
    """One cluster holds nearly all keys, some hold one, most none; the same for queries; masked keys at the end."""
    given_problem = problem(num_q_clusters=4, num_k_clusters=9, q_heads=1, kv_heads=1)
    n, m = NUM_QUERIES, NUM_KEYS
    q_offsets = torch.tensor([[[0, 0, n - 3, n - 3, n - 2, n, n]]], dtype=torch.int32)
    k_bounds = [0, 0, 1, m - 12, m - 12, m - 12, m - 11, m - 11, m - 10, m - 10, m - 5, m]
    k_offsets = torch.tensor([[k_bounds]], dtype=torch.int32)
    block_map = given_problem.block_map.clone()
    block_map[..., 2] = torch.tensor([True, True, False, True, False, True])
    means = (reference.cluster_means(x, k_offsets) for x in (given_problem.key, given_problem.value))
    k_centroids, v_centroids = means
    changes: dict[str, Any] = {"q_offsets": q_offsets, "k_offsets": k_offsets, "block_map": block_map}
    return replace(given_problem, **changes, k_centroids=k_centroids, v_centroids=v_centroids)


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("compensation", [False, True])
def test_giant_and_empty_clusters(compensation: bool, orders: bool, device: torch.device) -> None:
    check_attention(giant_and_empty_clusters(), device, compensation, orders)


@settings(max_examples=sized(30, 3), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    num_queries=st.integers(1, sized(700, 60)),
    num_keys=st.integers(1, sized(1500, 90)),
    num_q_clusters=st.integers(1, 20),
    num_k_clusters=st.integers(1, sized(60, 20)),
    keep=st.sampled_from([0.02, 0.3, 0.8, 1.1]),
    compensation=st.booleans(),
    orders=st.booleans(),
)
def test_random_problems(
    device: torch.device, kv_heads: int, group: int, compensation: bool, orders: bool, **shape: Any
) -> None:
    given_problem = problem(kv_heads=kv_heads, q_heads=kv_heads * group, head_dim=32, **shape)
    check_attention(given_problem, device, compensation, orders)


@pytest.mark.parametrize("layout", ["token major", "dim major", "slice of a larger tensor"])
def test_any_strides(layout: str, device: torch.device) -> None:
    args = moved(problem().args(), device)
    expected = ops.block_sparse_attention(*args)
    layouts = {
        "token major": token_major,
        "dim major": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "slice of a larger tensor": lambda x: torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    }
    actual = poisoned(device, ops.block_sparse_attention, *(layouts[layout](x) for x in args[:3]), *args[3:])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-4])
def test_unusual_scales(scale: float, device: torch.device) -> None:
    check_attention(replace(problem(), scale=scale), device)


def test_masked_garbage_is_never_read(device: torch.device) -> None:
    given_problem = problem(keep=1.1)
    clean = ops.block_sparse_attention(*moved(given_problem.args(True), device))
    for head in (0, 1):
        masked = slice(int(given_problem.k_offsets[0, head, -2]), None)
        given_problem.key[0, head, masked] = math.nan
        given_problem.value[0, head, masked] = math.nan
    assert bool(given_problem.key.isnan().any())
    actual = poisoned(device, ops.block_sparse_attention, *moved(given_problem.args(True), device))
    assert all(torch.equal(a, b) for a, b in zip(actual, clean, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_non_finite_tokens_show_exactly_where_they_are_attended(bad: float, where: str, device: torch.device) -> None:
    given_problem = problem(q_heads=1, kv_heads=1, num_k_clusters=3)
    given_problem.k_offsets[..., -2] = NUM_KEYS  # no masked keys
    q_block = int(torch.searchsorted(given_problem.q_offsets[0, 0, 1:].contiguous(), 5, right=True))
    given_problem.block_map[0, 0, q_block, :-1] = True  # so that the broken token is attended
    broken: Tensor = getattr(given_problem, where)
    broken[0, 0, 5, 2] = bad
    out, _ = poisoned(device, ops.block_sparse_attention, *moved(given_problem.args(), device))
    expected, _ = reference.block_sparse_attention(*given_problem.args())
    # inf in a value may come out as inf or NaN (0 * inf); what counts is that it shows, and nowhere else.
    assert torch.equal(out.cpu().isfinite(), expected.isfinite())
    assert not bool(expected.isfinite().all())


def test_density_is_the_oracle_s(device: torch.device) -> None:
    for shape in ({}, SHAPES["grouped heads, batch 2"], SHAPES["nothing kept"], SHAPES["no keys"]):
        args = problem(**shape).args()[3:6]
        actual = poisoned(device, ops.block_density, *moved(args, device))
        torch.testing.assert_close(actual.cpu(), reference.block_density(*args), rtol=1e-6, atol=1e-7)
