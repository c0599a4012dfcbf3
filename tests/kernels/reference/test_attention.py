"""The oracle's attention against formulas written a second, independent way: dense masks and pairs one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import Problem, assert_within_budget, make_problem

F64 = torch.float64


def token_blocks(offsets: Tensor, num_tokens: int) -> Tensor:
    """Block of every permuted position: int64 [B, H, N]."""
    positions = torch.arange(num_tokens).expand(*offsets.shape[:2], -1).contiguous()
    return torch.searchsorted(offsets[..., 1:].long().contiguous(), positions, right=True)


def dense_with_mask(problem: Problem, compensation: bool) -> tuple[Tensor, Tensor]:
    """The same attention as one dense softmax with a token mask (and bias columns), in float64."""
    repeats = problem.query.shape[1] // problem.key.shape[1]
    query = problem.query.to(F64)
    key, value = (t.to(F64).repeat_interleave(repeats, dim=1) for t in (problem.key, problem.value))
    k_offsets = problem.k_offsets.repeat_interleave(repeats, dim=1)
    q_block, k_block = token_blocks(problem.q_offsets, query.shape[2]), token_blocks(k_offsets, key.shape[2])
    rows = problem.block_map.gather(2, q_block.unsqueeze(-1).expand(-1, -1, -1, problem.block_map.shape[3]))
    mask = rows.gather(3, k_block.unsqueeze(2).expand(-1, -1, query.shape[2], -1))
    logits = (problem.scale * query @ key.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    if compensation:
        k_mean, v_mean = (
            t.to(F64).repeat_interleave(repeats, dim=1) for t in (problem.k_centroids, problem.v_centroids)
        )
        num_clusters = k_mean.shape[2]
        log_sizes = k_offsets.diff(dim=-1)[..., :num_clusters].to(F64).log().unsqueeze(2)
        columns = problem.scale * query @ k_mean.transpose(-1, -2) + log_sizes
        logits = torch.cat((logits, columns.masked_fill(rows[..., :num_clusters], -math.inf)), dim=-1)
        value = torch.cat((value, v_mean), dim=2)
    return torch.softmax(logits, dim=-1).nan_to_num(0.0) @ value, torch.logsumexp(logits, dim=-1)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("shape", [{}, {"q_heads": 4, "kv_heads": 2, "batch": 2}, {"value_dim": 5}, {"keep": 0.05}])
def test_attention_is_a_masked_dense_softmax(shape: dict[str, Any], compensation: bool) -> None:
    problem = make_problem(**shape)
    out, lse = reference.block_sparse_attention(*problem.args(compensation), compute_dtype=F64)
    exact_out, exact_lse = dense_with_mask(problem, compensation)
    assert_within_budget(out, exact_out, roundings=2)
    assert_within_budget(lse, exact_lse, roundings=2)


def test_full_map_is_dense_attention() -> None:
    problem = make_problem(dtype=torch.float32, num_queries=61, num_keys=61)
    full = torch.ones_like(problem.block_map)
    args = (*problem.args()[:5], full, problem.scale)
    out, _ = reference.block_sparse_attention(*args, compute_dtype=F64)
    dense = torch.nn.functional.scaled_dot_product_attention(*(t.to(F64) for t in args[:3]))
    assert_within_budget(out, dense, roundings=2)


def test_row_without_keys_is_zero_with_lse_minus_infinity() -> None:
    problem = make_problem(keep=0.0)
    out, lse = reference.block_sparse_attention(*problem.args())
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_block_density_counts_pairs() -> None:
    problem = make_problem(q_heads=4, kv_heads=2)
    density = reference.block_density(problem.q_offsets, problem.k_offsets, problem.block_map)
    q_block = token_blocks(problem.q_offsets, 130)
    k_block = token_blocks(problem.k_offsets.repeat_interleave(2, dim=1), 170)
    for h in range(4):
        pairs = problem.block_map[0, h][q_block[0, h]][:, k_block[0, h]]
        assert density[0, h].item() == pytest.approx(pairs.double().mean().item(), abs=1e-6)
