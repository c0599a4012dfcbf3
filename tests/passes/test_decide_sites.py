"""Every reason for staying dense, and the numbers of a site."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.passes.attention.find import find_attention
from svg2_compile.passes.decide_sites import decide_sites
from svg2_compile.passes.sites import Site
from svg2_compile.passes.token_layout import analyse_token_layout
from tests.passes.attention_graphs import DIM, SITES, decide, dynamo_graph, model_of, reasons, sdpa, video


class TwoStreams(nn.Module):
    """Attention whose tokens are made by ``mix(video, text)``; returns the video."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.mix = mix
        self.query, self.key = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden_states, text):
        queries, keys = self.mix(hidden_states, text)
        query, key = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer, x in ((self.query, queries), (self.key, keys))
        )
        attended = sdpa(query, key, key).transpose(1, 2).flatten(2)
        return hidden_states + attended.mean(1, keepdim=True)


def _decide_mixed(mix, text_tokens=6, **options):
    text = torch.randn(2, text_tokens, DIM)
    gm, _ = dynamo_graph(TwoStreams(mix).eval(), video(), text)
    return decide(gm, **options)


def test_context_before_and_after():
    (before,) = _decide_mixed(lambda v, t: (torch.cat([t, v], 1),) * 2)
    (after,) = _decide_mixed(lambda v, t: (torch.cat([v, t], 1),) * 2)
    (around,) = _decide_mixed(lambda v, t: (torch.cat([t, v, t], 1),) * 2)
    places = [(site.video_start, site.video_tokens, site.num_tokens) for site in (before, after, around)]
    assert places == [(6, 21, 27), (0, 21, 27), (6, 21, 33)]


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda v, t: (v, t), "cross_attention"),
        (lambda v, t: (t, v), "cross_attention"),
        (lambda v, t: (t, t), "not_video"),
        (lambda v, t: (v, torch.cat([v, t], 1)), "layout_mismatch"),
        (lambda v, t: (torch.cat([v, t], 1), torch.cat([t, v], 1)), "layout_mismatch"),
        (lambda v, t: (torch.cat([v, t, v], 1),) * 2, "multiple_video_segments"),
        (lambda v, t: (torch.linalg.qr(v.mT)[0].mT,) * 2, "unknown_layout"),
    ],
)
def test_layouts_that_stay_dense(mix, reason):
    (decision,) = _decide_mixed(mix)
    assert decision.reason == reason


def test_tokens_of_equal_number_but_another_origin():
    (decision,) = _decide_mixed(lambda v, t: (v, t), text_tokens=21)
    assert decision.reason == "cross_attention"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"is_causal": True}, "causal"), ({"dropout_p": 0.1}, "dropout")],
)
def test_options_of_the_attention(options, reason):
    gm, _ = dynamo_graph(model_of(lambda q, k, v: sdpa(q, k, v, **options)), video())
    assert reasons(gm) == [reason]


def test_unsupported_dtype():
    gm, _ = dynamo_graph(model_of(sdpa).double(), video().double())
    assert reasons(gm) == ["unsupported_dtype"]


@pytest.mark.parametrize(
    ("device", "min_tokens", "reason"),
    [("mps", 0, "unsupported_device"), ("cuda", "auto", "cost"), ("cuda", 0, "sparse")],
)
def test_devices(device, min_tokens, reason):
    gm, _ = dynamo_graph(model_of(sdpa), video())
    calls, unreadable = find_attention(gm)
    policy = dataclasses.replace(SITES, min_tokens=min_tokens)
    (decision,) = decide_sites(calls, unreadable, analyse_token_layout(gm), policy, torch.device(device))
    assert getattr(decision, "reason", "sparse") == reason


@pytest.mark.parametrize(
    ("widened", "device", "reason"), [(33, "cuda", "head_dim"), (32, "cuda", "sparse"), (33, "cpu", "sparse")]
)
def test_heads_wider_than_the_gpu_kernels_take(widened, device, reason):
    pytest.importorskip("triton")
    gm, _ = dynamo_graph(
        model_of(lambda q, k, v: sdpa(*(x.repeat(1, 1, 1, widened) for x in (q, k, v)))[..., :8]), video()
    )
    calls, unreadable = find_attention(gm)
    (decision,) = decide_sites(calls, unreadable, analyse_token_layout(gm), SITES, torch.device(device))
    assert getattr(decision, "reason", "sparse") == reason


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


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([model_of(sdpa) for _ in range(count)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("dense_layers", "expected"), [(0, 0), (2, 2), (0.03, 1), (0.5, 2), (0.51, 3)])
def test_dense_layers(dense_layers, expected):
    gm, _ = dynamo_graph(Layers(4), video())
    policy = dataclasses.replace(SITES, dense_layers=dense_layers)
    assert reasons(gm, policy) == ["dense_layer"] * expected + ["sparse"] * (4 - expected)
    sites = [decision for decision in decide(gm, policy) if isinstance(decision, Site)]
    assert [site.index for site in sites] == list(range(4 - expected))
    # Of a block compiled alone, the run time decides.
    assert reasons(gm, policy, regional=True) == ["sparse"] * 4


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
