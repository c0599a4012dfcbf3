"""Which lengths are worth it, and how many clusters they get."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.passes.sites import Site, Skip
from svg2_compile.passes.stays_dense import StaysDense
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
        policy = dataclasses.replace(
            SITES, num_q_clusters=None, num_k_clusters=None, min_tokens="auto", top_p=0.9, min_k_ratio=0.1
        )
        found.extend(decide(gm, dataclasses.replace(policy, min_tokens=1)))
        found.extend(decide(gm, policy))
        found.extend(decide(gm, dataclasses.replace(policy, min_tokens=901)))
        guards.append(len(shape_env.guards) - before)
        return gm

    found: list = []
    with torch.no_grad():
        torch.compile(model_of(sdpa), backend=decide_in_backend, dynamic=True)(video(2, 900))
    site, by_cost, bounded = found
    assert guards == [0]
    (symbol,) = site.video_tokens.free_symbols
    for tokens in (10, 900, 4096, 75_600, 10**6):
        assert site.num_q_clusters.subs(symbol, tokens) == QUERY_CLUSTERS.count(tokens)
        assert site.num_k_clusters.subs(symbol, tokens) == KEY_CLUSTERS.count(tokens)
    # Too short as they were traced: what is worth it is asked again at other sizes.
    assert by_cost.too_short.reason == "cost" and by_cost.predicted_speedup < 1
    assert bounded.too_short.reason == "short_sequence" and bounded.worth.symbols == {symbol}
    at = dict.fromkeys(by_cost.worth.symbols, 2)
    assert by_cost.worth.gain({**at, symbol: 40_000}) > 1 and bounded.worth.gain({symbol: 901}) is None
    for worth, reason in ((by_cost.worth, "cost"), (bounded.worth, "short_sequence")):
        with pytest.raises(StaysDense) as short:
            worth.gain({**at, symbol: 900})
        assert short.value.reason == reason


def _declared(most: int) -> list:
    """The decisions about a program exported for 2 to ``most`` tokens, at min_tokens=100."""
    tokens = torch.export.Dim("tokens", min=2, max=most)
    program = torch.export.export(model_of(sdpa), (video(1, 50),), dynamic_shapes=({1: tokens},))
    return decide(program.graph_module, dataclasses.replace(SITES, min_tokens=100))


def test_declared_ranges_settle_what_no_size_can_change():
    (never,), (maybe,) = _declared(99), _declared(100)
    assert isinstance(never, Skip) and never.reason == "short_sequence"
    assert isinstance(maybe, Site) and maybe.worth is not None


def test_a_cost_model_that_never_predicts_a_gain_settles_it():
    policy = dataclasses.replace(SITES, min_tokens="auto", top_p=1.0)
    tokens = torch.export.Dim("tokens", min=2, max=10**6)
    program = torch.export.export(model_of(sdpa), (video(1, 50),), dynamic_shapes=({1: tokens},))
    (decision,) = decide(program.graph_module, policy)
    assert isinstance(decision, Skip) and decision.reason == "cost" and "at no length" in decision.detail


def test_of_several_lengths_the_longest_waits_for_another_size():
    class TwoLengths(torch.nn.Module):
        def forward(self, x):
            half = x[:, :, : x.shape[2] // 2]
            return sdpa(x, x, x).sum() + sdpa(half, half, half).sum()

    found: list = []

    def backend(gm, _):
        for least in (10, 40, 70):
            found.append(decide(gm, dataclasses.replace(SITES, min_tokens=least)))
        return gm

    with torch.no_grad():
        tokens = torch.zeros(1, 2, 60, 8)
        torch._dynamo.mark_dynamic(tokens, 2)
        torch.compile(TwoLengths(), backend=backend)(tokens)
    kinds = [[type(decision) for decision in decisions] for decisions in found]
    assert kinds == [[Site, Site], [Site, Skip], [Site, Skip]]
    assert found[1][0].too_short is None and found[2][0].too_short is not None
