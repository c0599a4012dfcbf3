"""Which lengths are worth it, and how many clusters they get."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.passes.sites import Site
from tests.passes.attention_graphs import DIM, SITES, decide, dynamo_graph, model_of, reasons, sdpa, video


@pytest.mark.parametrize(("min_tokens", "reason"), [(21, "sparse"), (22, "short_sequence"), ("auto", "cost")])
def test_lengths(min_tokens, reason):
    gm, _ = dynamo_graph(model_of(sdpa), video())
    assert reasons(gm, dataclasses.replace(SITES, min_tokens=min_tokens)) == [reason]


def test_a_long_video_is_sparse_by_cost():
    gm, _ = dynamo_graph(model_of(sdpa), torch.zeros(1, 24000, DIM))
    policy = dataclasses.replace(
        SITES, min_tokens="auto", top_p=0.9, min_k_ratio=0.1, num_q_clusters=None, num_k_clusters=None
    )
    (site,) = decide(gm, policy)
    assert isinstance(site, Site) and site.predicted_speedup > 1
    assert (site.num_q_clusters, site.num_k_clusters) == (QUERY_CLUSTERS.count(24000), KEY_CLUSTERS.count(24000))


def test_clusters_never_outnumber_tokens():
    gm, _ = dynamo_graph(model_of(sdpa), video(tokens=4))
    (site,) = decide(gm, dataclasses.replace(SITES, num_q_clusters=300, num_k_clusters=300))
    assert (site.num_q_clusters, site.num_k_clusters) == (4, 4)


def test_symbolic_lengths_stay_symbolic_and_add_no_guard():
    guards = []

    def decide_in_backend(gm, _):
        shape_env = next(
            n.meta["example_value"].node.shape_env
            for n in gm.graph.find_nodes(op="placeholder")
            if isinstance(n.meta["example_value"], torch.SymInt)
        )
        before = len(shape_env.guards)
        policy = dataclasses.replace(SITES, num_q_clusters=None, num_k_clusters=None, min_tokens="auto")
        found.extend(decide(gm, dataclasses.replace(policy, min_tokens=1)))
        found.extend(decide(gm, policy))
        guards.append(len(shape_env.guards) - before)
        return gm

    found: list = []
    with torch.no_grad():
        torch.compile(model_of(sdpa), backend=decide_in_backend, dynamic=True)(video(2, 900))
    site, by_cost = found
    assert guards == [0]
    (symbol,) = site.video_tokens.free_symbols
    for tokens in (10, 900, 4096, 75_600, 10**6):
        assert site.num_q_clusters.subs(symbol, tokens) == QUERY_CLUSTERS.count(tokens)
        assert site.num_k_clusters.subs(symbol, tokens) == KEY_CLUSTERS.count(tokens)
    assert by_cost.reason == "cost" and by_cost.predicted_speedup < 1
