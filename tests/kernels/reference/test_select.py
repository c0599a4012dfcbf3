"""The oracle's block selection against small cases by hand and the formula of the error, key by key."""

from __future__ import annotations

import math

import pytest
import torch

from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.reference.select import min_clusters

F64 = torch.float64


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
