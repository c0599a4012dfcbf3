"""attention: equal to dense where all is kept, and to the compiled graph; state from step to step; reasons, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svg2_compile
from svg2_compile import AttentionState, attention
from tests.support import IDENTITY, SELECTION, assert_close

HEADS, WIDTH, TOKENS = 4, 16, 300
FIRST_ORDER = {**SELECTION, "top_p": None, "density": 0.3, "compensation": "first_order"}


def _tokens(heads: int = HEADS, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, TOKENS, WIDTH, generator=generator).to(dtype)


def _qkv(kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return _tokens(dtype=dtype), _tokens(kv_heads, dtype, seed=1), _tokens(kv_heads, dtype, seed=2)


def _only_reason(state: AttentionState) -> str:
    (reason,) = {site.reason for site in state.report().sites}
    return reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1], ids=["all heads", "two kv heads", "one kv head"])
@pytest.mark.parametrize("video", [None, (0, 240), (30, 200), [(0, 100), (140, 160)]], ids=str)
def test_equals_dense_attention_with_all_clusters_kept(dtype, kv_heads, video):
    query, key, value = _qkv(kv_heads, dtype)
    state = AttentionState(**IDENTITY)
    out = attention(query, key, value, state=state, video=video, step=0)
    assert_close(out, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    assert [run.graph for run in state.report().runs] == ["sparse"]


def test_key_padding_scale_and_autocast():
    query, key, value = _qkv()
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 250:] = False
    state = AttentionState(**IDENTITY)
    out = attention(query, key, value, state=state, attn_mask=mask, scale=0.3, step=0)
    assert_close(out, F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(query, key, value, state=state, step=0)
        expected = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == expected.dtype
    assert_close(out, expected)
    assert [run.graph for run in state.report().runs] == ["sparse", "sparse"]


class _Model(nn.Module):
    """Two layers of self-attention, whose attention is PyTorch's, or that of a state."""

    def __init__(self, state: AttentionState | None = None) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH) for _ in range(2))
        self.state = state

    def forward(self, hidden_states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        for layer, projection in enumerate(self.projections):
            qkv = projection(hidden_states + noise).unflatten(-1, (3, HEADS, WIDTH))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            if self.state is None:
                out = F.scaled_dot_product_attention(query, key, value)
            else:
                out = attention(query, key, value, state=self.state, layer=layer)
            hidden_states = hidden_states + out.transpose(1, 2).flatten(2)
        return hidden_states


@pytest.mark.parametrize("options", [SELECTION, FIRST_ORDER], ids=["top_p", "first order, layer budget"])
def test_equals_the_compiled_graph_step_by_step(options):
    """The same operators from the same centroids: bit by bit."""
    options = {**options, "dense_steps": 1}
    state = AttentionState(**options)
    plain, own = _Model(), _Model(state)
    own.load_state_dict(plain.state_dict())
    compiled = torch.compile(plain, backend="svg2", options=options)
    video = torch.randn(2, TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(4):
            noise = torch.tensor(0.3 * step)
            with svg2_compile.denoising(step=step, num_steps=4):
                assert torch.equal(own(video, noise), compiled(video, noise))
    runs, others = state.report().runs, svg2_compile.report(plain).runs
    told = [(run.step, run.graph, run.reason, run.iters, run.seeded, run.density) for run in runs]
    assert told == [(run.step, run.graph, run.reason, run.iters, run.seeded, run.density) for run in others]
    assert any(run.seeded for run in runs) and all(run.density < 0.95 for run in runs if run.graph == "sparse")


def test_layers_branches_and_requests_keep_their_own_centroids():
    state = AttentionState(**SELECTION)
    query, key, value = _qkv()
    for step in range(3):
        for request in ("a", "b"):
            for branch in ("cond", "uncond"):
                with svg2_compile.denoising(request=request, step=step, num_steps=3, branch=branch):
                    for layer in (0, "blocks.1"):
                        attention(query, key, value, state=state, layer=layer)
    runs = state.report().runs
    assert {run.site for run in runs} == {"layers.0.attention", "blocks.1.attention"}
    cold = [run for run in runs if not run.seeded]
    assert len(cold) == 8 and {run.step for run in cold} == {0}
    assert state.session.store.num_entries == 0  # the last step has taken them


def test_unnamed_calls_of_a_step_go_by_their_order():
    state = AttentionState(**{**SELECTION, "dense_layers": 1})
    query, key, value = _qkv()
    outputs = []
    for step in range(2):
        with svg2_compile.denoising(step=step, num_steps=4):
            outputs.append([attention(shift * query, key, value, state=state) for shift in (1.0, -1.0)])
    assert [run.seeded for run in state.report().runs] == [False, False, True, True]
    assert state.session.store.num_entries == 2
    assert not torch.equal(*outputs[1])


def test_dense_steps_and_layers():
    state = AttentionState(num_layers=40, **{**SELECTION, "dense_steps": 0.25, "dense_layers": 0.03})
    query, key, value = _qkv()
    for step in range(4):
        for layer in range(3):
            attention(query, key, value, state=state, layer=layer, step=step, num_steps=4)
    reasons = [run.reason for run in state.report().runs]
    assert reasons[:3] == ["dense_steps"] * 3
    assert reasons[3:6] == ["dense_layers", "dense_layers", "sparse"]  # 3 % of 40 layers, rounded up


def test_a_step_that_goes_back_is_another_video():
    state = AttentionState(**SELECTION)
    query, key, value = _qkv()
    for step in (0, 1, 0, 1):
        attention(query, key, value, state=state, step=step)
    assert [(run.video, run.seeded) for run in state.report().runs] == [(0, False), (0, True), (1, False), (1, True)]
    state.reset()
    attention(query, key, value, state=state, step=2)
    assert not state.report().runs[-1].seeded


def test_without_a_step_it_stays_dense_and_says_so(caplog):
    query, key, value = _qkv()
    state = AttentionState(**{**SELECTION, "dense_steps": 2})
    out = attention(query, key, value, state=state)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))
    assert [run.reason for run in state.report().runs] == ["no_timestep"]
    assert "svg2_compile.denoising(step=...)" in caplog.text


def test_the_scheduler_of_a_state_tells_the_step():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    query, key, value = _qkv()
    state = AttentionState(scheduler=scheduler, **{**SELECTION, "dense_steps": 1})
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        out = attention(query, key, value, state=state, layer=0)
        scheduler.step(out, timestep, query)
    runs = state.report().runs
    assert [(run.step, run.reason, run.source) for run in runs] == [
        (0, "dense_steps", "scheduler"),
        (1, "sparse", "scheduler"),
        (2, "sparse", "scheduler"),
    ]


def test_gradients_keep_it_dense(caplog):
    query, key, value = _qkv()
    query.requires_grad_()
    state = AttentionState(**IDENTITY)
    out = attention(query, key, value, state=state, step=0)
    out.sum().backward()
    assert query.grad is not None and query.grad.abs().sum() >= 0
    assert [run.reason for run in state.report().runs] == ["training"]
    assert "gradients are wanted" in caplog.text
    with torch.no_grad():
        attention(query, key, value, state=state, step=1)
    with torch.inference_mode():
        attention(query, key, value, state=state, step=2)
    assert [run.graph for run in state.report().runs] == ["dense", "sparse", "sparse"]


def _dense(state: AttentionState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> None:
    out = attention(query, key, value, state=state, step=0, **more)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, **more))


def test_what_stays_dense_has_its_reason():
    query, key, value = _qkv()
    causal, cross, biased, short = (AttentionState(**IDENTITY) for _ in range(4))
    _dense(causal, query, key, value, is_causal=True)
    assert _only_reason(causal) == "causal"
    _dense(cross, query, key[:, :, :50], value[:, :, :50])
    assert _only_reason(cross) == "cross_attention"
    _dense(biased, query, key, value, attn_mask=torch.randn(TOKENS, TOKENS))
    assert _only_reason(biased) == "query_dependent_mask"
    short = AttentionState(**{**IDENTITY, "min_tokens": 10_000})
    _dense(short, query, key, value)
    assert _only_reason(short) == "short_sequence"


def test_a_sparse_graph_that_fails_gives_way_to_the_dense_one(monkeypatch, caplog):
    query, key, value = _qkv()
    state = AttentionState(**{**SELECTION, "strict": False})
    attention(query, key, value, state=state, step=0)

    def broken(self: Any, *args: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr("svg2_compile.runtime.program.DenoisingProgram._run_sparse", broken)
    out = attention(query, key, value, state=state, step=1)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))
    assert "no memory" in caplog.text and state.report().runs[-1].reason == "failed"


def test_inside_of_a_compiled_model_it_breaks_the_graph_and_works():
    query, key, value = _qkv()
    state = AttentionState(**IDENTITY)

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query * 2, key, value, state=state, step=0) + 1

    with torch.no_grad():
        out = torch.compile(model, backend="eager")(query, key, value)
    assert_close(out, F.scaled_dot_product_attention(query * 2, key, value) + 1)
    assert [run.graph for run in state.report().runs] == ["sparse"]


Q = torch.zeros(2, 4, 10, 8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": torch.zeros(4, 10, 8)}, ValueError, "query has shape .* four axes"),
        ({"query": [1]}, TypeError, "query is list"),
        ({"key": torch.zeros(2, 3, 10, 8)}, ValueError, "key has shape .* 4 heads"),
        ({"key": torch.zeros(2, 4, 10, 9)}, ValueError, "key has shape"),
        ({"key": Q.double()}, ValueError, "key is torch.float64"),
        ({"value": torch.zeros(2, 4, 11, 8)}, ValueError, "value has shape"),
        ({"state": {}}, TypeError, "state is dict"),
        ({"attn_mask": 1.0}, TypeError, "attn_mask is float"),
        ({"video": 7}, TypeError, "video is 7"),
        ({"video": (0, 11)}, ValueError, r"video is \(0, 11\)\. Valid: .* within the 10 tokens"),
        ({"video": [(4, 4), (0, 4)]}, ValueError, "video is .* in their order"),
        ({"video": (0.0, 4)}, TypeError, "video is"),
        ({"step": -1}, ValueError, "step is -1"),
    ],
)
def test_bad_arguments_are_named(changed, error, message):
    arguments = {"query": Q, "key": Q, "value": Q, "state": AttentionState(), **changed}
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"num_layers": 1.5}, TypeError, "num_layers is 1.5"),
        ({"densty": 0.1}, ValueError, "Did you mean 'density'"),
        ({"scheduler": 3}, TypeError, "scheduler: expected an object with set_timesteps"),
    ],
)
def test_bad_options_of_a_state_are_named(options, error, message):
    with pytest.raises(error, match=message):
        AttentionState(**options)
