"""transform: the same passes, the same numbers and the same clock as behind torch.compile."""

from __future__ import annotations

import pytest
import torch

import svg2_compile
from svg2_compile.export.transform import run_on_program
from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.runtime.session import Session
from tests.export.programs import block, block_inputs, exported, exported_block, first, runs_of
from tests.support import IDENTITY, SELECTION, TOLERANCE, assert_close, at_timestep, first_output
from tests.zoo.models import build

# name -> (module paths of the attentions that must be sparse, video tokens, context tokens). Nothing else may be.
EXPECTED = {
    "wan_t2v": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
    "wan_i2v": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
    "hunyuan_video": (["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"], 128, 12),
    "cogvideox_rope": (["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"], 32, 8),
    "ltx_video": (["transformer_blocks.0.attn1"], 128, 0),
    "allegro": (["transformer_blocks.0.attn1"], 32, 0),
    "easyanimate": (["transformer_blocks.0.attn1"], 128, 16),
    "skyreels_v2": (["blocks.0.attn1", "blocks.1.attn1"], 128, 0),
}
CASES = [(name, "as exported") for name in EXPECTED] + [
    *(("wan_t2v", "strict"), ("wan_t2v", "decomposed"), ("hunyuan_video", "decomposed"), ("ltx_video", "strict")),
]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_keeping_all_clusters_equals_eager(name, form):
    module, inputs = build(name)
    program = svg2_compile.transform(exported(name, form), **IDENTITY)
    paths, video, context = EXPECTED[name]
    if form != "decomposed":  # there, other names are left on the softmax
        assert [site.name for site in program.sparse_sites] == paths
    assert {(site.video_tokens, site.context_tokens) for site in program.sparse_sites} == {(video, context)}
    for timestep in (900, 900, 700):
        call = at_timestep(inputs, timestep)
        with torch.no_grad():
            assert_close(first_output(program, call), first_output(module, call))
    assert runs_of(program.report(), len(paths)) == [
        ("sparse", 0, 0, 0, False),
        ("sparse", 0, 0, 1, False),
        ("sparse", 0, 1, 0, True),
    ]


def test_mochi_with_its_tokens_picked_by_a_mask():
    """Sizes that depend on data; the video of each sample attends with its own number of text tokens."""
    module, inputs = build("mochi")
    program = svg2_compile.transform(exported("mochi", "strict"), **IDENTITY)
    assert len(program.sparse_sites) == 4
    for timestep in (100, 300):
        call = at_timestep(inputs, timestep)
        with torch.no_grad():
            assert_close(first_output(program, call), first_output(module, call))
    assert {run.graph for run in program.report().runs} == {"sparse"}


@pytest.mark.parametrize("name", ["wan_t2v", "ltx_video", "cogvideox_rope"])
def test_a_real_selection_equals_the_torch_compile_door(name):
    """Two videos, dense and sparse steps: every step, every density, every record."""
    options = {**SELECTION, "top_p": 0.9, "dense_steps": 1}
    module, inputs = build(name)
    program = svg2_compile.transform(exported(name), **options)
    compiled = torch.compile(module, backend="svg2", options=options)
    for timestep in (900, 700, 500, 900, 700):
        call = at_timestep(inputs, timestep)
        with torch.no_grad():
            # A tie in k-means or in the selection may fall differently; it must not.
            assert_close(first_output(program, call), first_output(compiled, call), slack=10)
    mine, theirs = program.report(), svg2_compile.report(module)
    assert runs_of(mine) == runs_of(theirs)
    assert {run.video for run in mine.runs} == {0, 1} and {run.graph for run in mine.runs} == {"dense", "sparse"}
    assert [run.density for run in mine.runs] == pytest.approx([run.density for run in theirs.runs], abs=1e-3)
    assert mine.mean_density is not None and mine.mean_density < 1.0


def test_dense_steps_are_the_exported_program_bit_for_bit():
    _, inputs = build("wan_t2v")
    program = svg2_compile.transform(exported("wan_t2v"), **{**SELECTION, "dense_steps": 2})
    plain = exported("wan_t2v").module()
    for timestep in (900, 700):
        call = at_timestep(inputs, timestep)
        assert torch.equal(first_output(program, call), first_output(plain, call))
    assert {run.graph for run in program.report().runs} == {"dense"}


def test_guidance_in_one_batch_is_one_branch():
    _, inputs = build("wan_t2v_batch2")
    program = svg2_compile.transform(exported("wan_t2v_batch2"), **SELECTION)
    for timestep in (900, 700, 500):
        program(**at_timestep(inputs, timestep))
    assert {(run.step, run.context) for run in program.report().runs} == {(0, 0), (1, 0), (2, 0)}


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "ltx_video"])
def test_with_every_site_skipped_the_graph_is_the_same(name):
    source = exported(name)
    before = source.graph_module.code
    program = svg2_compile.transform(source, **{**IDENTITY, "min_tokens": 10**9})
    assert program.sparse is None and program.dense is source
    assert {site.reason for site in program.sites} >= {"short_sequence"}
    assert source.graph_module.code == before
    assert run_on_program(source, program.config).gm.code == before


def test_a_transform_leaves_the_program_and_its_weights_alone():
    source = exported("wan_t2v")
    before = source.graph_module.code
    guards = len(_shape_env(source).guards)
    one, two = (svg2_compile.transform(source, **IDENTITY) for _ in range(2))
    assert source.graph_module.code == before and len(_shape_env(source).guards) == guards
    assert one.sparse is not None and one.sparse.state_dict is source.state_dict
    assert one.sparse.graph_module.code == two.sparse.graph_module.code
    replaced = [n for n in one.sparse.graph.nodes if operator_name(n) == "scaled_dot_product_attention"]
    assert len(replaced) == 2  # the cross-attentions


def _shape_env(program):
    (value, *_) = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if "val" in n.meta]
    return value.fake_mode.shape_env


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module, inputs = block().to(dtype), tuple(value.to(dtype) for value in block_inputs())
    program = svg2_compile.transform(torch.export.export(module, inputs), **IDENTITY)
    with torch.no_grad():
        assert_close(program(*inputs), module(*inputs))
    assert program.report().runs and dtype in TOLERANCE


def test_a_block_alone_counts_steps_by_its_modulation():
    """As users export pieces: no timestep among the inputs, only a tensor made from it."""
    model, inputs = build("wan_t2v")
    captured = {}
    hook = model.blocks[1].register_forward_pre_hook(lambda _, args: captured.update(args=args))
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        module, args = model.blocks[1], captured["args"]
        # First layers are to stay dense: a block alone does not know that it is one of them.
        options = {**SELECTION, "dense_layers": 0.03, "dense_steps": 1}
        program = svg2_compile.transform(torch.export.export(module, args), **options)
        assert program.time.kind == "modulation" and program.graph_report.regional
        for factor in (1.0, 1.0, 0.5, 0.25, 1.0):
            hidden, text, modulation, rotary = args
            call = (hidden, text, modulation * factor, rotary)
            assert first(program(*call)).shape == first(module(*call)).shape
    assert runs_of(program.report()) == [
        ("dense", 0, 0, 0, False),
        ("dense", 0, 0, 1, False),
        ("sparse", 0, 1, 0, False),
        ("sparse", 0, 2, 0, True),
        ("dense", 1, 0, 0, False),
    ]


def test_an_exception_drops_the_video():
    program = svg2_compile.transform(exported_block(), **SELECTION)
    video, time = block_inputs()
    expected = [program(video, time - step) for step in range(3)]
    denoiser = program.denoiser(Session(program.config))
    program.run(denoiser, (video, time), {})
    sparse, denoiser.sparse = denoiser.sparse, _raising
    with pytest.raises(RuntimeError, match="in the middle"):
        program.run(denoiser, (video, time - 1), {})
    denoiser.sparse = sparse
    again = [program.run(denoiser, (video, time - step), {}) for step in range(3)]
    assert all(torch.equal(one, two) for one, two in zip(again, expected, strict=True))


def _raising(*args):
    raise RuntimeError("in the middle")


def test_reset_and_report_know_a_program():
    program = svg2_compile.transform(exported_block(), **SELECTION)
    assert [site.decision for site in program.report().sites] == ["sparse"]
    video, time = block_inputs()
    expected = [program(video, time - step) for step in range(2)]
    assert svg2_compile.report(program).store_entries == 1
    svg2_compile.reset(program)
    assert svg2_compile.report(program).store_entries == 0
    assert all(torch.equal(program(video, time - step), want) for step, want in enumerate(expected))
    assert "1 of 1 attentions sparse" in repr(program)
