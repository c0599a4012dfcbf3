"""Diffusers' own video transformers: the right attentions become sparse, and the result is right."""

from __future__ import annotations

import pytest
import torch

import svg2_compile
from svg2_compile.kernels import ops
from tests.support import IDENTITY, SELECTION, TOLERANCE, assert_close, at_timestep, first_output
from tests.zoo.models import build

# name -> (module paths of the attentions that must be sparse, video tokens, context tokens). Nothing else may be.
EXPECTED = {
    "wan_t2v": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
    "wan_i2v": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
    "hunyuan_video": (["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"], 128, 12),
    "cogvideox": (["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], 32, 8),
    "ltx_video": (["transformer_blocks.0.attn1"], 128, 0),
    "allegro": (["transformer_blocks.0.attn1"], 32, 0),
    "easyanimate": (["transformer_blocks.0.attn1"], 128, 16),
    "skyreels_v2": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
}
# A block compiled alone is handed a float mask: that it only pads cannot be seen from inside.
MASKED_FROM_OUTSIDE = {"allegro"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_right_attentions_are_sparse_and_no_other(name):
    module, inputs = build(name)
    report = svg2_compile.explain(module, options=IDENTITY, **inputs)
    paths, video, context = EXPECTED[name]
    assert [site.name for site in report.sparse_sites] == paths
    assert {(site.video_tokens, site.context_tokens) for site in report.sparse_sites} == {(video, context)}
    assert all(site.reason != "sparse" for site in report.sites if site.decision == "dense")
    assert report.graph_breaks == []


@pytest.mark.parametrize("name", EXPECTED)
def test_keeping_all_clusters_equals_eager(name):
    module, inputs = build(name)
    with torch.no_grad():
        compiled = torch.compile(module, backend="svg2", fullgraph=True, options=IDENTITY)
        for timestep in (900, 900, 700):
            call = at_timestep(inputs, timestep)
            assert_close(first_output(compiled, call), first_output(module, call))
    runs = svg2_compile.report(module).runs
    sites = len(EXPECTED[name][0])
    assert [(run.graph, run.step, run.context, run.seeded) for run in runs[::sites]] == [
        ("sparse", 0, 0, False),
        ("sparse", 0, 1, False),
        ("sparse", 1, 0, True),
    ]


def test_text_that_masks_pick_is_cut_off_again_in_every_layer():
    module, inputs = build("hunyuan_video15")
    with torch.no_grad():
        expected = first_output(module, inputs)
        with svg2_compile.enable(module, regional=False, **IDENTITY) as enabled:
            assert_close(first_output(module, inputs), expected)
            paths = [site.name for site in enabled.report().sites if site.decision == "sparse"]
    assert paths == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


@pytest.mark.parametrize("name", EXPECTED)
def test_regional_equals_eager(name):
    module, inputs = build(name)
    with torch.no_grad():
        expected = [first_output(module, at_timestep(inputs, timestep)) for timestep in (900, 700)]
        with svg2_compile.enable(module, regional=True, **IDENTITY) as enabled:
            for timestep, reference in zip((900, 700), expected, strict=True):
                assert_close(first_output(module, at_timestep(inputs, timestep)), reference)
            report = enabled.report()
    sparse = {site.name for site in report.sites if site.decision == "sparse"}
    if name in MASKED_FROM_OUTSIDE:
        assert sparse == set() and "additive_bias" in {site.reason for site in report.sites}
        return
    assert set(EXPECTED[name][0]) <= sparse
    # A text block that is compiled alone cannot be told from a video block; all that is video must be there.
    assert {run.site for run in report.runs if run.graph == "sparse"} == sparse


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_selection_equals_the_reference_operators(name):
    """The same compiled program, once with the fast operators and once with the readable ones."""
    results = []
    for implementation in ("cpu", "reference"):
        module, inputs = build(name)
        torch._dynamo.reset()
        with torch.no_grad(), ops.use_implementation(implementation):
            compiled = torch.compile(module, backend="svg2", options=SELECTION)
            outputs = [first_output(compiled, at_timestep(inputs, timestep)) for timestep in (900, 700)]
        results.append(outputs)
        assert svg2_compile.report(module).mean_density < 1.0
    for fast, readable in zip(*results, strict=True):
        # A tie in k-means or in the selection may fall differently; it must not.
        assert_close(fast, readable, slack=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "cogvideox"])
def test_half_precision(name, dtype):
    module, inputs = build(name)
    module = module.to(dtype)
    inputs = {key: value.to(dtype) if _is_float(value) else value for key, value in inputs.items()}
    with torch.no_grad():
        expected = first_output(module, inputs)
        compiled = torch.compile(module, backend="svg2", options=IDENTITY)
        assert_close(first_output(compiled, inputs), expected)
    assert svg2_compile.report(module).runs
    assert dtype in TOLERANCE


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", EXPECTED)
def test_one_compile_per_graph_kind(name):
    module, inputs = build(name)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        compiled = torch.compile(module, backend="svg2", options={**IDENTITY, "dense_steps": 1})
        for timestep in (900, 900, 700, 700, 500):
            first_output(compiled, at_timestep(inputs, timestep))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(svg2_compile.report(module).graphs) == 1


def test_mochi_falls_into_pieces_and_says_so():
    module, inputs = build("mochi")
    with torch.no_grad():
        expected = first_output(module, inputs)
        compiled = torch.compile(module, backend="svg2", options=IDENTITY)
        assert_close(first_output(compiled, inputs), expected)


def test_mochi_is_whole_and_sparse_when_enabled():
    module, inputs = build("mochi")
    with torch.no_grad():
        expected = [first_output(module, at_timestep(inputs, timestep)) for timestep in (100, 300)]
        with svg2_compile.enable(module, fullgraph=True, **IDENTITY) as enabled:
            for timestep, reference in zip((100, 300), expected, strict=True):
                assert_close(first_output(module, at_timestep(inputs, timestep)), reference)
            report = enabled.report()
    assert len(report.graphs) == 1
    # Two samples attend apart, each to its own valid text tokens.
    blocks = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    assert [site.name for site in report.sparse_sites] == [
        f"{name}{sample}" for name in blocks for sample in ("", "#2")
    ]
    assert {run.graph for run in report.runs} == {"sparse"}
