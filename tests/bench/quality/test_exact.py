"""What the exact attention says, against brute force; and what is computed from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bench.quality.capture import Attention
from bench.quality.clusters import Budget, Clustering, SparseAttention, cluster, cluster_by_position, keep_labels
from bench.quality.counts import FACTORS, CountStudy
from bench.quality.exact import best_blocks, block_mass, exact_rows, recall, token_recall
from bench.quality.measure import average, interpolate, require_exact, variance_within
from bench.quality.reuse import CARRIED_ITERS, COLD_ITERS, ReuseStudy

COUNTS = (4, 7)


def some_attention(step: int = 0, seed: int = 0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (1.5 * torch.randn(1, 2, 60, 8, generator=generator) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return Attention(0, step, query, key, value, dense)


def probabilities(attention: Attention) -> Tensor:
    return torch.softmax(attention.query[0].double() @ attention.key[0].double().mT * attention.scale, dim=-1)


def brute_force_recall(attention: Attention, clustering: Clustering, block_map: Tensor) -> float:
    total, exact = 0.0, probabilities(attention)
    for head in range(2):
        for q, k in itertools.product(range(60), range(60)):
            i, j = int(clustering.query.labels[0, head, q]), int(clustering.key.labels[0, head, k])
            total += float(exact[head, q, k]) * float(block_map[0, head, i, j])
    return total / (2 * 60)


def test_recall_equals_brute_force() -> None:
    attention = some_attention()
    clusterings = [cluster(attention, COUNTS, 3), cluster_by_position(attention, COUNTS, "tiles", (3, 4, 5))]
    for clustering, mass in zip(clusterings, block_mass(attention, clusterings), strict=True):
        assert mass.sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
        block_map = SparseAttention(attention, clustering).select(Budget(0.3))
        assert recall(mass, block_map) == pytest.approx(brute_force_recall(attention, clustering, block_map), abs=1e-5)
        assert recall(mass, torch.ones_like(block_map)) == pytest.approx(1.0, abs=1e-6)


def test_mass_of_some_queries_is_theirs_alone() -> None:
    attention, rows = some_attention(), torch.tensor([3, 30, 59])
    clustering = cluster(attention, COUNTS, 2)
    (mass,) = block_mass(attention, [clustering], rows)
    expected = torch.zeros(2, *COUNTS, dtype=torch.float64)
    for head, row, key in itertools.product(range(2), rows.tolist(), range(60)):
        i, j = clustering.query.labels[0, head, row], clustering.key.labels[0, head, key]
        expected[head, i, j] += probabilities(attention)[head, row, key] / 3
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-5)


def test_best_blocks_beat_the_estimate_and_are_best() -> None:
    attention = some_attention()
    clustering = cluster_by_position(attention, (4, 6), "raster", (1, 6, 10))  # equal blocks: the best is well-defined
    (mass,) = block_mass(attention, [clustering])
    best = best_blocks(mass, clustering, 0.5)
    assert best[0, :, :4, :6].sum(dim=-1).unique().tolist() == [3]
    torch.testing.assert_close(recall(mass, best), float(mass.topk(3, dim=-1).values.sum(dim=(1, 2)).mean()))
    assert recall(mass, best) >= recall(mass, SparseAttention(attention, clustering).select(Budget(0.5)))


def test_token_recall_bounds_every_selection() -> None:
    attention = some_attention()
    by_hand = probabilities(attention).sort(dim=-1, descending=True).values[..., : math.ceil(0.3 * 60)].sum(-1).mean()
    assert token_recall(attention, [0.3, 1.0]) == pytest.approx([float(by_hand), 1.0], abs=1e-5)
    clustering = cluster(attention, COUNTS, 5)
    sparse = SparseAttention(attention, clustering)
    (mass,) = block_mass(attention, [clustering])
    block_map = sparse.select(Budget(0.3))
    assert recall(mass, block_map) <= token_recall(attention, [min(1.0, 2 * sparse.density(block_map))])[0]


def test_gate_accepts_the_operators_and_refuses_a_wrong_result() -> None:
    attention = some_attention()
    clusterings = {"svg2": cluster(attention, COUNTS, 2)}
    assert require_exact(attention, clusterings) < 1e-5
    rows = torch.arange(0, 60, 7)
    torch.testing.assert_close(exact_rows(attention, rows).float(), attention.dense[:, :, rows])
    wrong = Attention(0, 0, attention.query, attention.key, attention.value, attention.dense + 1e-3)
    with pytest.raises(AssertionError, match="exceeds"):
        require_exact(wrong, clusterings)


def test_kept_labels_have_the_means_of_now() -> None:
    before, now = some_attention(seed=0), some_attention(seed=1)
    clustering = cluster(before, COUNTS, 3)
    kept = keep_labels(now, clustering)
    assert torch.equal(kept.key.labels, clustering.key.labels)
    members = clustering.key.labels[0, 1] == 2
    torch.testing.assert_close(kept.key.centroids[0, 1, 2], now.key[0, 1, members].mean(dim=0))


def test_variance_within_is_one_for_one_cluster_and_falls() -> None:
    attention = some_attention()
    one, many = cluster(attention, (1, 1), 1), cluster(attention, (60, 60), 1)
    assert variance_within(attention.key, one.key) == pytest.approx(1.0, abs=1e-6)
    assert variance_within(attention.key, many.key) == pytest.approx(0.0, abs=1e-6)
    some = variance_within(attention.key, cluster(attention, COUNTS, 9).key)
    assert some < variance_within(attention.key, cluster_by_position(attention, COUNTS, "raster", (3, 4, 5)).key) < 1


def test_reuse_study_rows() -> None:
    study = ReuseStudy(COUNTS)
    for step in (5, 6, 7):
        study.add(some_attention(step, seed=step))
    rows = {(row["start"], row["iters"], row["age"]): row for row in study.results()}
    assert len(rows) == (len(CARRIED_ITERS) + len(COLD_ITERS)) * 3
    first = [rows["carried", iters, 0] for iters in CARRIED_ITERS]
    for row in first:  # all start from the same cold clusters
        assert {**row, "start": "cold", "iters": 50} == rows["cold", 50, 0]
    # These steps have nothing in common: yesterday's labels are no better than chance, new iterations repair it.
    assert rows["carried", 0, 2]["key_variance_within"] > rows["carried", 5, 2]["key_variance_within"] + 0.1
    assert 0 < rows["carried", 2, 1]["recall_fixed"] <= 1


def test_more_clusters_approximate_better() -> None:
    study = CountStudy((6, 12), iters=5)
    study.add(some_attention())
    rows = study.results()
    assert [(row["num_q_clusters"], row["num_k_clusters"]) for row in rows] == [
        (round(6 * q), round(12 * k)) for q, k in FACTORS
    ]
    for name in ("svg2+comp error at 25%", "svg2+comp+ear error at 25%"):
        assert rows[-1][name] < rows[0][name]
    assert rows[-1]["recall at 25%"] > rows[0]["recall at 25%"]


def test_average_and_interpolation() -> None:
    assert average([{"a": [1.0, 2.0]}, {"a": [3.0, 2.0]}]) == {"a": [2.0, 2.0]}
    curve = {"density": [0.1, 0.3], "recall": [0.4, 0.6], "error": [0.5, 0.3]}
    assert interpolate(curve, "recall", 0.2) == pytest.approx(0.5)
    assert interpolate(curve, "recall", 0.65) == pytest.approx(0.8)
    assert interpolate(curve, "error", 0.65) == pytest.approx(0.15)
