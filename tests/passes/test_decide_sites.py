"""Every reason for staying dense, and the numbers of a site."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

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


def test_a_video_in_several_pieces():
    (site,) = _decide_mixed(lambda v, t: (torch.cat([t, v, t, v], 1),) * 2)
    assert (site.video_start, site.video_tokens, site.num_tokens) == (0, 42, 54)
    assert site.video_parts == ((6, 21), (33, 21))


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda v, t: (v, t), "cross_attention"),
        (lambda v, t: (t, v), "cross_attention"),
        (lambda v, t: (t, t), "not_video"),
        (lambda v, t: (v, torch.cat([v, t], 1)), "layout_mismatch"),
        (lambda v, t: (torch.cat([v, t], 1), torch.cat([t, v], 1)), "layout_mismatch"),
        (lambda v, t: (torch.linalg.qr(v.mT)[0].mT,) * 2, "unknown_layout"),
    ],
)
def test_layouts_that_stay_dense(mix, reason):
    (decision,) = _decide_mixed(mix)
    assert decision.reason == reason


def test_tokens_of_equal_number_but_another_origin():
    (decision,) = _decide_mixed(lambda v, t: (v, t), text_tokens=21)
    assert decision.reason == "cross_attention"


class Fragment(nn.Module):
    """What a graph break leaves of an attention: queries, keys and values as they come, [B, N, H, D]."""

    def __init__(self, projects=False) -> None:
        super().__init__()
        self.norm = nn.Linear(8, 8) if projects else nn.LayerNorm(8)

    def forward(self, query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (self.norm(query), self.norm(key), value))
        return sdpa(query, key, value).transpose(1, 2).flatten(2)


def _decide_fragment(keys=21, projects=False, shared=False):
    torch._dynamo.reset()
    query, key, value = (torch.randn(2, tokens, 2, 8) for tokens in (21, keys, keys))
    model = Fragment(projects).eval()
    gm, _ = dynamo_graph(model, query, key, key if shared else value)
    (decision,) = decide(gm)
    return decision


def test_inputs_of_one_length_behind_a_graph_break_attend_to_each_other():
    site = _decide_fragment()
    assert isinstance(site, Site) and (site.video_tokens, site.num_tokens) == (21, 21)


@pytest.mark.parametrize("changed", [{"keys": 6}, {"projects": True}, {"shared": True}])
def test_other_inputs_are_different_tokens(changed):
    assert _decide_fragment(**changed).reason == "cross_attention"


class Single(nn.Module):
    """A block that is handed video and text as one tensor; positions are of the video alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, tokens, rotary, text_tokens):
        query, key, value = self.qkv(tokens).unflatten(2, (3, 2, -1)).unbind(2)
        query, key = (
            torch.cat([x[:, :-text_tokens] * rotary[None, :, None], x[:, -text_tokens:]], 1) for x in (query, key)
        )
        return tokens + sdpa(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_text_has_no_position(dynamic):
    gm, _ = dynamo_graph(Single().eval(), video(tokens=27), torch.randn(21, 8), 6, dynamic=dynamic)
    (site,) = decide(gm)
    text = site.num_tokens - site.video_tokens
    assert site.video_start == 0 and (len(text.free_symbols) == 1 if dynamic else text == 6)


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
