"""Sparse attention on the attentions of the trained model, layer by layer: clusters by meaning, and error-aware routing
(SVG-EAR, arXiv 2603.08982)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from bench.minidit.sample import PROMPTS
from bench.quality.capture import Attention, watch_attention
from bench.quality.clusters import Budget, Clustering, SparseAttention, cluster, cluster_by_position
from bench.quality.exact import block_mass
from bench.quality.measure import error_curves, interpolate, recall_curves, require_exact
from bench.quality.routing import RoutingStudy, compensation_errors
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.kernels.cpu.estimates import KeyHead, head_estimates
from svg2_compile.minidit.model import CONFIG, WEIGHTS, VideoSize, load_model

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="needs the trained weights")

SIZE, GRID = VideoSize(8, 48, 48), (8, 12, 12)
COUNTS = QUERY_CLUSTERS.count(SIZE.tokens), KEY_CLUSTERS.count(SIZE.tokens)
DENSITIES = (0.1, 0.25, 0.4)
LAYERS = range(CONFIG["num_layers"])


@pytest.fixture(scope="module")
def attentions() -> list[Attention]:
    """Every layer's attention in the middle of the sampling."""
    taken: list[Attention] = []
    watch_attention(load_model(), PROMPTS[1], 0, SIZE, 6, 3.0, (3,), taken.append)
    return taken


@pytest.fixture(scope="module")
def semantic(attentions: list[Attention]) -> list[Clustering]:
    return [cluster(attention, COUNTS, 50) for attention in attentions]


def test_all_blocks_selected_is_dense_in_every_variant(attentions: list[Attention], semantic: list[Clustering]) -> None:
    for layer in (LAYERS[0], LAYERS[-1]):
        assert require_exact(attentions[layer], {"svg2": semantic[layer]}) < 2e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_compensation_with_error_routing_beats_plain_selection(
    layer: int, attentions: list[Attention], semantic: list[Clustering]
) -> None:
    curves = error_curves(attentions[layer], {"svg2": semantic[layer]}, DENSITIES)
    for density in DENSITIES:
        plain, routed = (interpolate(curves[name], "error", density) for name in ("svg2", "svg2+comp+ear"))
        assert routed < 0.9 * plain, f"layer {layer}, density {density}"


@pytest.mark.parametrize("layer", LAYERS)
def test_clusters_by_meaning_recall_more_than_runs_of_tokens(
    layer: int, attentions: list[Attention], semantic: list[Clustering]
) -> None:
    attention = attentions[layer]
    clusterings = {"svg2": semantic[layer], "raster": cluster_by_position(attention, COUNTS, "raster", GRID)}
    curves = recall_curves(attention, clusterings, DENSITIES)
    for density in DENSITIES:
        by_meaning, by_position = (interpolate(curves[name]["density"], "recall", density) for name in clusterings)
        assert by_meaning > by_position, f"layer {layer}, density {density}"


def test_selected_mass_is_estimated_well(attentions: list[Attention], semantic: list[Clustering]) -> None:
    """The selection sees centroids only; one who knows the exact mass of every block recalls little more."""
    for attention, clustering in zip(attentions, semantic, strict=True):
        curves = recall_curves(attention, {"svg2": clustering}, DENSITIES)["svg2"]
        for density in DENSITIES:
            known, estimated = (interpolate(curves[mode], "recall", density) for mode in ("oracle", "density"))
            assert known - 0.1 < estimated <= known + 0.02


def test_error_estimate_against_the_exact_error(attentions: list[Attention], semantic: list[Clustering]) -> None:
    """The centroid stands in for its queries: exact for queries that equal it, a fair ranking for real ones."""
    attention, clustering = attentions[4], semantic[4]
    sparse, head = SparseAttention(attention, clustering), 2
    offsets = clustering.key.offsets.diff(dim=-1)[0, head, : COUNTS[1]]
    means = (clustering.key.centroids[0, head], sparse.v_centroids[0, head])

    def estimate(queries: Tensor) -> Tensor:
        keys = KeyHead(sparse.key[0, head], sparse.value[0, head], *means, offsets)
        return head_estimates(queries, keys, attention.scale)[1]

    queries = attention.query[0, head]
    exact, _ = compensation_errors(sparse, head, queries)
    log_sum = (queries.double() @ sparse.key[0, head].double().T * attention.scale).logsumexp(dim=1, keepdim=True)
    # A cluster of one key has error 0, and a rounding error instead of it.
    large = exact > 1e-12 * exact.amax(dim=1, keepdim=True)
    relative = estimate(queries).double() - 2 * log_sum
    torch.testing.assert_close(relative[large], exact.log()[large], atol=1e-3, rtol=1e-4)

    labels = clustering.query.labels[0, head].long()
    of_members = torch.zeros(COUNTS[0], COUNTS[1], dtype=torch.float64).index_add_(0, labels, exact)
    of_centroid = estimate(clustering.query.centroids[0, head])
    for row in range(COUNTS[0]):
        ranks = torch.stack([of_members[row].log(), of_centroid[row].double()]).argsort(dim=-1).argsort(dim=-1)
        assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.7


def test_both_error_estimates_beat_the_mass_and_none_the_oracle(
    attentions: list[Attention], semantic: list[Clustering]
) -> None:
    study = RoutingStudy()
    for attention, clustering in zip(attentions, semantic, strict=True):
        study.add(attention, clustering)
    errors = {row["ranked_by"]: row["error at 25%"] for row in study.results()}
    assert errors["oracle"] < min(errors["error"], errors["squares"])
    assert max(errors["error"], errors["squares"]) < 0.75 * errors["score"]


def test_masses_are_those_of_the_whole_softmax(attentions: list[Attention], semantic: list[Clustering]) -> None:
    (mass,) = block_mass(attentions[0], [semantic[0]])
    assert mass.sum(dim=(1, 2)).tolist() == pytest.approx([1.0] * CONFIG["num_attention_heads"], abs=1e-4)
    sparse = SparseAttention(attentions[0], semantic[0])
    assert sparse.density(sparse.select(Budget(0.25))) == pytest.approx(0.25, abs=0.06)
