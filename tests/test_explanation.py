"""explain: every attention with its decision, nothing run sparse."""

from __future__ import annotations

import pytest
import torch

import svg2_compile
from tests.support import IDENTITY
from tests.zoo.models import build


@pytest.fixture
def no_sparse_operator(monkeypatch):
    def fail(*_):
        raise AssertionError("explain ran a sparse operator")

    monkeypatch.setattr("svg2_compile.kernels.cpu.implementation.kmeans", fail)


def test_the_default_says_why_a_short_sequence_stays_dense(no_sparse_operator):
    module, inputs = build("wan_t2v")
    report = svg2_compile.explain(module, **inputs)
    assert [(site.name, site.decision, site.reason) for site in report.sites] == [
        ("blocks.0.attn1", "dense", "cost"),
        ("blocks.0.attn2", "dense", "cross_attention"),
        ("blocks.1.attn1", "dense", "cost"),
        ("blocks.1.attn2", "dense", "cross_attention"),
    ]
    first = report.sites[0]
    assert (first.video_tokens, first.context_tokens, first.num_heads, first.head_dim) == (128, 0, 2, 12)
    assert 0 < first.predicted_speedup <= 1
    assert "min_tokens" in str(report)


def test_an_integer_min_tokens_overrides_the_cost_model(no_sparse_operator):
    module, inputs = build("wan_t2v")
    for min_tokens, reason in ((128, "sparse"), (129, "short_sequence")):
        report = svg2_compile.explain(module, options={**IDENTITY, "min_tokens": min_tokens}, **inputs)
        assert {site.reason for site in report.sites if "attn1" in site.name} == {reason}


def test_joint_attention_counts_context(no_sparse_operator):
    module, inputs = build("hunyuan_video")
    report = svg2_compile.explain(module, options=IDENTITY, **inputs)
    assert {(s.video_tokens, s.context_tokens) for s in report.sparse_sites} == {(128, 12)}
    # The text refiner attends within the text.
    assert [site.reason for site in report.sites if "refiner" in site.name] == ["not_video"]


def test_graph_breaks_are_reported_and_the_way_out_named(no_sparse_operator):
    module, inputs = build("mochi")
    report = svg2_compile.explain(module, options=IDENTITY, **inputs)
    assert any("nonzero" in reason for reason in report.graph_breaks)
    assert len(report.sparse_sites) == 4
    assert "capture_dynamic_output_shape_ops" in str(report)


def test_every_piece_of_a_broken_model_is_analysed(no_sparse_operator):
    module, inputs = build("wan_t2v")

    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = module.blocks

        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            hidden_states = self.blocks[0](hidden_states, encoder_hidden_states, temb, rotary_emb)
            torch._dynamo.graph_break()
            return self.blocks[1](hidden_states, encoder_hidden_states, temb, rotary_emb)

    captured = {}
    module.blocks[0].register_forward_pre_hook(lambda _, args: captured.setdefault("args", args))
    with torch.no_grad():
        module(**inputs)
    module.blocks[0]._forward_pre_hooks.clear()
    report = svg2_compile.explain(Broken(), *captured["args"], options=IDENTITY)
    assert len(report.graphs) >= 2 and report.graph_breaks
    assert [site.name.split(".")[-1] for site in report.sparse_sites] == ["attn1", "attn1"]


def test_explaining_an_enabled_module_changes_nothing(no_sparse_operator):
    module, inputs = build("wan_t2v")
    with svg2_compile.enable(module, **IDENTITY) as enabled:
        before = module._compiled_call_impl
        assert len(svg2_compile.explain(module, options=IDENTITY, **inputs).sparse_sites) == 2
        assert module._compiled_call_impl is before
        assert enabled.report().runs == []
