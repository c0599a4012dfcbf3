"""The backend "svg2" in diffusers' own pipelines: what enable computes, without a compiler."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch

import svg2_compile
from svg2_compile.integrations.diffusers import BackendUnsupported, register_backend, registry
from tests.e2e.pipelines import build
from tests.support import IDENTITY, SELECTION, assert_close

OPTIONS = {**SELECTION, "dense_steps": 1}
BOTH = ["wan", "hunyuan", "ltx", "cogvideox"]


@pytest.fixture(autouse=True)
def _no_backend_for_all_models():
    """diffusers makes what is set for one model that of all which have none."""
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


def _told(report: Any) -> list[tuple[Any, ...]]:
    return [
        (run.step, run.context, run.graph, run.reason, run.iters, run.seeded, run.density, run.source)
        for run in report.runs
    ]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "options",
    [OPTIONS, {**OPTIONS, "top_p": None, "density": 0.3, "compensation": "first_order", "dense_layers": 1}],
    ids=["top_p", "first order"],
)
def test_computes_what_enable_computes(name, options):
    """Bit by bit, with the same decisions, steps, branches and centroids."""
    enabled_pipeline, small = build(name), build(name)
    with svg2_compile.enable(enabled_pipeline.pipe, **options) as enabled:
        expected = [enabled_pipeline.run(), enabled_pipeline.run(seed=1)]
        reference = enabled.report()
    register_backend(**options)
    small.pipe.transformer.set_attention_backend("svg2")
    assert all(torch.equal(small.run(seed=seed), expected[seed]) for seed in range(2))
    report = svg2_compile.report(small.pipe.transformer)
    # A whole graph has no records of the layers that stay dense in it.
    sparse, others = ([run for run in _told(found) if run[2] == "sparse"] for found in (report, reference))
    assert sparse == others
    assert any(run.seeded for run in report.runs)


@pytest.mark.parametrize("name", BOTH)
def test_equals_dense_attention_with_all_clusters_kept(name):
    expected = build(name).run()
    register_backend(**IDENTITY)
    small = build(name)
    small.pipe.transformer.set_attention_backend("svg2")
    assert_close(small.run(), expected, slack=50)
    report = svg2_compile.report(small.pipe.transformer)
    assert {run.graph for run in report.runs} == {"sparse"}
    assert {site.reason for site in report.sites} <= {"sparse", "cross_attention"}


def test_text_beside_the_video_is_found_on_both_sides():
    places = {}
    for name in ("hunyuan", "cogvideox"):
        register_backend(**IDENTITY)
        small = build(name)
        small.pipe.transformer.set_attention_backend("svg2")
        small.run(steps=1)
        sites = svg2_compile.report(small.pipe.transformer).sites
        places[name] = {(site.video_tokens, site.context_tokens) for site in sites}
    assert places == {"hunyuan": {(128, 12)}, "cogvideox": {(128, 8)}}


def test_a_model_first_met_in_a_call():
    """The context manager of diffusers names no model, nor is it known which branch the call is that is under way."""
    expected = build("hunyuan").run()
    register_backend(**IDENTITY)
    small = build("hunyuan")
    with attention_dispatch.attention_backend("svg2"):
        assert_close(small.run(), expected, slack=50)
    runs = svg2_compile.report(small.pipe.transformer).runs
    assert [run.step for run in runs if not run.seeded] == [0, 0, 1, 1] and {run.graph for run in runs} == {"sparse"}


def test_another_backend_ends_it():
    register_backend(**OPTIONS)
    small = build("wan")
    expected = small.run()
    small.pipe.transformer.set_attention_backend("svg2")
    small.run()
    small.pipe.transformer.set_attention_backend("native")
    assert torch.equal(small.run(), expected)
    assert small.pipe.transformer._compiled_call_impl is None


def test_a_model_that_looks_at_data_stays_dense_and_says_why(monkeypatch):
    small = build("ltx")
    expected = small.run()
    plain = type(small.pipe.transformer.transformer_blocks[0]).forward

    def looking(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden_states.sum() > 1e9:
            raise AssertionError
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(small.pipe.transformer.transformer_blocks[0]), "forward", looking)
    register_backend(**{**IDENTITY, "strict": False})
    small.pipe.transformer.set_attention_backend("svg2")
    assert torch.equal(small.run(), expected)
    sites = svg2_compile.report(small.pipe.transformer).sites
    assert {site.reason for site in sites} == {"unknown_layout", "cross_attention"}
    assert any("could not be followed on tensors without data" in site.detail for site in sites)


def test_a_compiled_model_sees_plain_attention():
    """Set to the backend and compiled with ours, the compiler makes it sparse."""
    expected = build("wan").run()
    register_backend(**IDENTITY)
    small = build("wan")
    with svg2_compile.enable(small.pipe, **IDENTITY) as enabled:
        small.pipe.transformer.set_attention_backend("svg2")
        assert_close(small.run(), expected, slack=50)
        assert {run.graph for run in enabled.report().runs} == {"sparse"}


def test_two_experts_have_their_own_state():
    register_backend(**OPTIONS)
    small = build("wan_two_experts")
    for transformer in (small.pipe.transformer, small.pipe.transformer_2):
        transformer.set_attention_backend("svg2")
    small.run()
    first, second = (svg2_compile.report(t) for t in (small.pipe.transformer, small.pipe.transformer_2))
    assert first.runs and second.runs
    assert max(run.step for run in first.runs) < min(run.step for run in second.runs)


def test_a_cache_of_diffusers_keeps_its_state():
    """Its hooks keep tensors: those of the run without data must not be among them."""
    register_backend(**{**IDENTITY, "dense_steps": 1})
    alone, small = build("wan"), build("wan")
    for pipeline in (alone, small):
        pipeline.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))
    expected = alone.run()
    small.pipe.transformer.set_attention_backend("svg2")
    assert_close(small.run(), expected, slack=50)
    runs = svg2_compile.report(small.pipe.transformer).runs
    assert sum(run.graph == "sparse" for run in runs) == 18


def test_context_parallelism_is_refused():
    register_backend(**OPTIONS)
    small = build("wan")
    attention = attention_dispatch._AttentionBackendRegistry._backends[attention_dispatch.AttentionBackendName("svg2")]
    tensor = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="context parallelism"):
        attention(tensor, tensor, tensor, _parallel_config=object())
    assert not small.pipe.transformer.is_gradient_checkpointing


def test_another_version_of_diffusers_is_named(monkeypatch):
    monkeypatch.setattr(attention_dispatch._AttentionBackendRegistry, "_backends", [])
    with pytest.raises(BackendUnsupported, match=rf"{diffusers.__version__}.*_backends.*Tried: {registry.TESTED}"):
        register_backend()


def test_options_are_checked_at_once():
    with pytest.raises(svg2_compile.ConfigError, match="Did you mean 'density'"):
        register_backend(densty=0.1)
