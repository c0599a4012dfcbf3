"""Attention on the CPU against the oracle in float64: odd shapes, dtypes, input scales, and random problems."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels.cpu import attention as cpu_attention
from svg2_compile.kernels.cpu import keys as cpu_keys
from svg2_compile.kernels.cpu.attention import QueryGroup, key_parts, merge_partial_softmax, shared_calls
from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.tuning.lookup import override
from tests.kernels.helpers import EDGE_SHAPES, Problem, assert_within_budget, make_problem

F64 = torch.float64
LIMITS = {"MIN_KEYS_PER_PART": 128, "MIN_IDLE_PAIRS": 1 << 16}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: dict[str, dict[str, Any]] = {
    **EDGE_SHAPES,
    "plain": {},
    "odd head_dim": {"head_dim": 19},
    "value wider": {"head_dim": 8, "value_dim": 24},
    "value narrower": {"head_dim": 24, "value_dim": 7},
    "keys cut into parts": {"num_queries": 70, "num_keys": 1501, "num_q_clusters": 3, "num_k_clusters": 12},
}


def exact_and_eager(problem: Problem, compensation: bool) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (out, lse), and the out of the oracle in the inputs' own precision: the error any eager code makes."""
    args = problem.args(compensation)
    out, lse = reference.block_sparse_attention(*to_double(args), compute_dtype=F64)
    eager, _ = reference.block_sparse_attention(*args, compute_dtype=problem.query.dtype)
    return out, lse, eager


def to_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check_attention(cpu: ModuleType, problem: Problem, compensation: bool) -> None:
    expected = exact_and_eager(problem, compensation)
    check_against(cpu, problem, compensation, *expected)
    # Keys cut into parts wherever it is possible at all.
    with override("cpu_attention", {"MIN_KEYS_PER_PART": 16, "MIN_IDLE_PAIRS": -1}):
        check_against(cpu, problem, compensation, *expected)


def check_against(
    cpu: ModuleType, problem: Problem, compensation: bool, exact_out: Tensor, exact_lse: Tensor, eager: Tensor
) -> None:
    out, lse = cpu.block_sparse_attention(*problem.args(compensation))
    assert out.dtype == problem.query.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_within_budget(out, exact_out, eager)
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    finite = exact_lse > -math.inf
    # The log-sum-exp is float32 whatever the inputs: its error is that of a score.
    assert_within_budget(lse[finite], exact_lse[finite].double(), roundings=64)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_shapes(cpu: ModuleType, name: str, compensation: bool) -> None:
    check_attention(cpu, make_problem(**SHAPES[name]), compensation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_scale", [1.0, 4.0, 16.0])
def test_attention_over_dtypes_and_input_scales(cpu: ModuleType, dtype: torch.dtype, input_scale: float) -> None:
    for compensation in (False, True):
        check_attention(cpu, make_problem(dtype=dtype, input_scale=input_scale, num_keys=700), compensation)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    keep=st.sampled_from([0.02, 0.3, 0.8, 1.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    compensation=st.booleans(),
)
def test_attention_over_random_problems(
    cpu: ModuleType, kv_heads: int, group: int, compensation: bool, **shape: Any
) -> None:
    check_attention(cpu, make_problem(kv_heads=kv_heads, q_heads=kv_heads * group, **shape), compensation)


def test_attention_takes_any_strides(cpu: ModuleType) -> None:
    problem = make_problem(q_heads=3, kv_heads=3)
    expected = cpu.block_sparse_attention(*problem.args())
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in problem.args()[:3]]
    dim_major = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in problem.args()[:3]]
    for strided in (token_major, dim_major):
        actual = cpu.block_sparse_attention(*strided, *problem.args()[3:])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_attention_does_not_depend_on_the_number_of_threads(cpu: ModuleType, threads: int) -> None:
    problem = make_problem(num_queries=90, num_keys=1700, num_q_clusters=3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_attention(cpu, problem, compensation=True)
        check_attention(cpu, problem, compensation=False)
    finally:
        torch.set_num_threads(before)


def test_attention_does_not_depend_on_the_memory_it_may_take(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(batch=2, q_heads=4, kv_heads=2, num_queries=300, num_keys=900, num_q_clusters=20)
    at_once = cpu.block_sparse_attention(*problem.args(True))
    monkeypatch.setattr(cpu_attention, "TABLE_BYTES", 1)  # a head at a time
    monkeypatch.setattr(cpu_attention, "MAX_LISTED_KEYS", 1)  # a list at a time: no call is shared
    monkeypatch.setattr(cpu_keys, "MAX_LISTED_AT_ONCE", 1)
    one_by_one = cpu.block_sparse_attention(*problem.args(True))
    torch.testing.assert_close(one_by_one, at_once, rtol=0, atol=2e-6)


def test_key_parts_never_waste_a_thread_nor_cut_too_small() -> None:
    assert key_parts(num_groups=1, num_rows=100, num_keys=4000, num_threads=2, limits=LIMITS) == 2
    assert key_parts(num_groups=1, num_rows=256, num_keys=4000, num_threads=2, limits=LIMITS) == 1  # 4 x 64 rows
    assert key_parts(num_groups=1, num_rows=100, num_keys=200, num_threads=2, limits=LIMITS) == 1
    assert key_parts(num_groups=1, num_rows=100, num_keys=4000, num_threads=1, limits=LIMITS) <= 1


def test_key_parts_share_out_the_rows_of_all_groups() -> None:
    shared = {"num_rows": 100, "num_keys": 4000, "num_threads": 2, "limits": LIMITS}
    assert key_parts(num_groups=2, **shared) == 1  # type: ignore[arg-type]
    assert key_parts(num_groups=8, **shared) == 1  # type: ignore[arg-type]
    assert key_parts(num_groups=3, **shared) == 2  # type: ignore[arg-type]  # 192 and 108 rows


def test_calls_are_shared_by_groups_of_like_size() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(200, 500, (200, 2), generator=generator).tolist()
    groups = [QueryGroup(i, rows, torch.arange(keys)) for i, (rows, keys) in enumerate(sizes)]
    calls = list(shared_calls(groups, max_keys=2000))
    assert sorted(group.first_row for call in calls for group in call) == list(range(200))
    assert len(calls) < 90
    for call in calls:
        keys, rows = ([getattr(group, name) for group in call] for name in ("num_keys", "num_rows"))
        assert max(keys) <= 1.125 * min(keys)
        assert max(rows) + 32 <= 1.126 * (min(rows) + 32)
        assert len(call) * max(keys) <= 2000


def test_merge_of_partial_softmaxes() -> None:
    torch.manual_seed(0)
    scores, values = 5 * torch.randn(7, 12), torch.randn(12, 3)
    pieces = scores.split(4, dim=1), values.split(4)
    out = torch.stack([torch.softmax(s, dim=1) @ v for s, v in zip(*pieces, strict=True)])
    lse = torch.stack([torch.logsumexp(s, dim=1) for s in pieces[0]])
    merged, merged_lse = merge_partial_softmax(out, lse)
    torch.testing.assert_close(merged, torch.softmax(scores, dim=1) @ values)
    torch.testing.assert_close(merged_lse, torch.logsumexp(scores, dim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("num_keys", [7, 170])
def test_non_finite_tokens_show_exactly_where_they_are_attended(
    cpu: ModuleType, bad: float, where: str, num_keys: int
) -> None:
    problem = make_problem(num_keys=num_keys, num_k_clusters=3, q_heads=1, kv_heads=1)
    problem.k_offsets[..., -2] = num_keys  # no masked keys
    q_block = int(torch.searchsorted(problem.q_offsets[0, 0, 1:].contiguous(), 5, right=True))
    problem.block_map[0, 0, q_block, :-1] = True  # so that the broken token is attended
    getattr(problem, where)[0, 0, 5, 2] = bad
    out, _ = cpu.block_sparse_attention(*problem.args())
    expected, _ = reference.block_sparse_attention(*problem.args())
    # inf in a value may come out as inf or NaN (0 * inf); what counts is that it shows, and nowhere else.
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not bool(expected.isfinite().all())


def test_masked_garbage_is_never_read(cpu: ModuleType) -> None:
    problem = make_problem(keep=1.1)
    clean = cpu.block_sparse_attention(*problem.args())
    for b, h in ((0, 0), (0, 1)):
        masked = slice(int(problem.k_offsets[b, h, -2]), None)
        problem.key[b, h, masked] = math.nan
        problem.value[b, h, masked] = math.nan
    assert int((problem.key.isnan()).sum()) > 0
    actual = cpu.block_sparse_attention(*problem.args())
    torch.testing.assert_close(actual, clean, rtol=0, atol=0)


def test_offsets_that_are_no_partition_are_refused(cpu: ModuleType) -> None:
    problem = make_problem()
    args = list(problem.args())
    args[4] = problem.k_offsets + 1
    with pytest.raises(ValueError, match=r"k_offsets is no partition of 170 tokens"):
        cpu.block_sparse_attention(*args)


def test_block_density_equals_the_oracle(cpu: ModuleType) -> None:
    problem = make_problem(batch=2, q_heads=4, kv_heads=2)
    args = (problem.q_offsets, problem.k_offsets, problem.block_map)
    torch.testing.assert_close(cpu.block_density(*args), reference.block_density(*args))
    nothing = make_problem(num_queries=0)
    density = cpu.block_density(nothing.q_offsets, nothing.k_offsets, nothing.block_map)
    assert density.tolist() == [[0.0, 0.0]]
