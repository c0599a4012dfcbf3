"""The oracle against formulas written a second, independent way: dense masks, brute force, small cases by hand."""

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


def test_kmeans_labels_are_nearest_and_centroids_their_means() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 57, 6)
    start = torch.randn(2, 3, 8, 6)
    labels, centroids, sizes = reference.kmeans(x, start, torch.tensor(True), 1, compute_dtype=F64)
    distances = torch.cdist(x.to(F64), start.to(F64))
    assert torch.equal(labels.long(), distances.argmin(dim=-1))
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(8)).tolist():
        members = x[b, h][labels[b, h] == c]
        assert sizes[b, h, c] == members.shape[0]
        expected = members.mean(dim=0) if members.shape[0] else start[b, h, c]
        torch.testing.assert_close(centroids[b, h, c], expected)


def test_kmeans_seeds_are_spread_over_valid_tokens() -> None:
    x = torch.arange(12.0).view(1, 1, 12, 1)
    valid = torch.ones(1, 1, 12, dtype=torch.bool)
    valid[..., :4] = False
    ignored = torch.full((1, 1, 2, 1), math.nan)
    _, centroids, sizes = reference.kmeans(x, ignored, torch.tensor(False), 1, valid)
    # Seeds are tokens 6 and 10 of the valid ones 4..11; token 8 is as near to one as to the other and goes to the
    # first.
    assert sizes.tolist() == [[[5, 3]]]
    assert centroids.flatten().tolist() == [6.0, 10.0]


def test_kmeans_lowers_the_within_cluster_distance() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 300, 4)
    errors = []
    for iters in (1, 2, 4, 8):
        labels, centroids, _ = reference.kmeans(x, torch.zeros(1, 1, 9, 4), torch.tensor(False), iters)
        errors.append((x[0, 0] - centroids[0, 0][labels[0, 0].long()]).square().sum().item())
    assert errors == sorted(errors, reverse=True)


def test_cluster_order_by_hand() -> None:
    labels = torch.tensor([[[1, 0, 1, 0]]], dtype=torch.int32)
    valid = torch.tensor([[[True, True, True, False, True, True, False]]])
    order, offsets = reference.cluster_order(labels, 3, 1, 7, valid)
    # Tokens 1..4 are video, 0, 5 and 6 context; 3 and 6 are masked. Cluster 2 is empty.
    assert order.tolist() == [[[2, 4, 1, 0, 5, 3, 6]]]
    assert offsets.tolist() == [[[0, 2, 3, 3, 5, 7]]]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ((0.5, 0.0, None), [True, False, False, False]),  # 0.6 alone reaches 0.5
        ((0.61, 0.0, None), [True, True, False, False]),  # the cluster that crosses is kept
        ((0.0, 0.0, None), [True, False, False, False]),  # never none
        ((0.0, 0.75, None), [True, True, True, False]),
        ((0.999, 0.0, None), [True, True, True, False]),  # an empty cluster is not needed
        ((1.0, 0.0, None), [True, True, True, True]),
        ((0.9, 1.0, 0.2), [True, False, False, False]),  # 2 of 10 keys; min_k_ratio plays no part
        ((0.9, 0.0, 0.3), [True, True, False, False]),  # 2 keys are less than 3
    ],
)
def test_select_blocks_by_hand(limits: tuple[float, float, float | None], kept: list[bool]) -> None:
    masses, sizes = torch.tensor([0.6, 0.3, 0.1, 1.0]), torch.tensor([2, 5, 3, 0])
    k_centroids = (masses / sizes.clamp(min=1)).log().view(1, 1, 4, 1)
    k_centroids[..., 3, :] = 9.0  # empty: must not matter
    q_centroids, q_sizes = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int32)
    k_sizes = sizes.view(1, 1, 4).to(torch.int32)
    block_map = reference.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, 1.0, *limits)
    assert block_map[0, 0, 0].tolist() == [*kept, True, False]
    assert block_map[0, 0, 1].tolist() == [True] * 5 + [False]  # context row
    assert block_map[0, 0, 2].tolist() == [False] * 4 + [True, False]  # null row


def test_ratio_of_clusters_is_rounded_up_but_not_by_floating_point() -> None:
    from svg2_compile.kernels.reference.select import min_clusters

    assert [min_clusters(0.1, n) for n in (30, 1000, 31, 1)] == [3, 100, 4, 1]


def test_selection_by_error_ranks_by_the_exact_error_per_key() -> None:
    torch.manual_seed(1)
    key, value = torch.randn(1, 1, 40, 3), torch.randn(1, 1, 40, 2)
    k_offsets = torch.tensor([[[0, 5, 17, 18, 40, 40, 40]]], dtype=torch.int32)
    k_mean, v_mean = reference.cluster_means(key, k_offsets), reference.cluster_means(value, k_offsets)
    q_mean, q_sizes = torch.randn(1, 1, 6, 3), torch.ones(1, 1, 6, dtype=torch.int32)
    block_map = reference.select_blocks_by_error(
        key, value, k_offsets, q_mean, k_mean, v_mean, q_sizes, 0.7, 0.9, 0.0, 0.4, compute_dtype=F64
    )
    bounds = k_offsets[0, 0].tolist()
    for i in range(6):
        at_mean = [math.exp(0.7 * float(q_mean[0, 0, i] @ k_mean[0, 0, j])) for j in range(4)]
        mass = [(bounds[j + 1] - bounds[j]) * at_mean[j] for j in range(4)]
        output = sum((mass[j] * v_mean[0, 0, j] for j in range(4)), torch.zeros(2)) / sum(mass)
        error_per_key = []
        for j in range(4):
            total = torch.zeros(2)
            for t in range(bounds[j], bounds[j + 1]):
                exact = math.exp(0.7 * float(q_mean[0, 0, i] @ key[0, 0, t]))
                total += (exact - at_mean[j]) * (value[0, 0, t] - output)
            error_per_key.append(float(total.square().sum()) / (bounds[j + 1] - bounds[j]))
        budget, expected = 0.4 * 40, [False] * 4
        for j in sorted(range(4), key=lambda cluster: -error_per_key[cluster]):
            if budget <= 0:
                break
            expected[j] = True
            budget -= bounds[j + 1] - bounds[j]
        assert block_map[0, 0, i, :4].tolist() == expected


def test_block_density_counts_pairs() -> None:
    problem = make_problem(q_heads=4, kv_heads=2)
    density = reference.block_density(problem.q_offsets, problem.k_offsets, problem.block_map)
    q_block = token_blocks(problem.q_offsets, 130)
    k_block = token_blocks(problem.k_offsets.repeat_interleave(2, dim=1), 170)
    for h in range(4):
        pairs = problem.block_map[0, h][q_block[0, h]][:, k_block[0, h]]
        assert density[0, h].item() == pytest.approx(pairs.double().mean().item(), abs=1e-6)
