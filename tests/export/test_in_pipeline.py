"""A program in the place of a pipeline's transformer: the pipeline runs as before, the steps told by its scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import svg2_compile
from svg2_compile import ExportError
from svg2_compile.settings.config import ConfigError
from tests.e2e.pipelines import SmallPipeline, build
from tests.support import IDENTITY, SELECTION, assert_close


def export_transformers(small: SmallPipeline, **options: Any) -> dict[str, svg2_compile.TransformedProgram]:
    """Every transformer of a pipeline, exported with the arguments of its last call."""
    modules = {name: item for name, item in small.pipe.components.items() if isinstance(item, torch.nn.Module)}
    captured: dict[str, dict[str, Any]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: captured.__setitem__(name, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    small.run(steps=4)
    for hook in hooks:
        hook.remove()
    programs = {}
    for name, kwargs in captured.items():
        given = {key: value for key, value in kwargs.items() if value is not None}
        with torch.no_grad():
            programs[name] = svg2_compile.transform(torch.export.export(modules[name], (), given), **options)
    return programs


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_a_pipeline_runs_as_before(name, tmp_path):
    """Guidance in two calls (Wan) and in one batch (LTX, CogVideoX), through a file."""
    small = build(name)
    expected = small.run(steps=4)
    (program,) = export_transformers(small, **{**IDENTITY, "dense_steps": 0.25}).values()
    svg2_compile.save(program, tmp_path / "program.pt2")
    run = svg2_compile.load(tmp_path / "program.pt2")
    with svg2_compile.enable(small.pipe, program=run) as enabled:
        assert_close(small.run(steps=4), expected, slack=20)
        first_video = len(enabled.report().runs)
        assert_close(small.run(steps=4), expected, slack=20)
        report = enabled.report()
    for video, runs in enumerate((report.runs[:first_video], report.runs[first_video:])):
        assert {run.video for run in runs} == {video}
        assert sorted({(run.step, run.context, run.graph) for run in runs}) == [
            (step, context, "dense" if step == 0 else "sparse")
            for step in range(4)
            for context in range(small.guidance_branches)
        ]
    assert torch.equal(small.run(steps=4), expected)  # put back what was there
    assert run.report().runs == []  # the program's own state was not touched


def test_a_file_gives_what_enable_gives():
    """The same video from the file and from Dynamo's graphs, with a real selection."""
    small = build("wan")
    options = {**SELECTION, "top_p": 0.9, "dense_steps": 0.25}
    (program,) = export_transformers(small, **options).values()
    with svg2_compile.enable(small.pipe, **options) as enabled:
        expected, theirs = small.run(steps=4), enabled.report()
    with svg2_compile.enable(small.pipe, program=program) as enabled:
        # A tie in k-means or in the selection may fall differently; it must not.
        assert_close(small.run(steps=4), expected, slack=50)
        mine = enabled.report()
    assert [(r.site, r.step, r.context, r.graph, r.iters) for r in mine.runs] == [
        (r.site, r.step, r.context, r.graph, r.iters) for r in theirs.runs
    ]
    assert mine.density_per_step() == pytest.approx(theirs.density_per_step(), abs=1e-2)


def test_two_experts_and_what_does_not_fit():
    small = build("wan_two_experts")
    expected = small.run(steps=4)
    programs = export_transformers(small, **IDENTITY)
    assert set(programs) == {"transformer", "transformer_2"}
    with svg2_compile.enable(small.pipe, program=programs, dense_steps=1) as enabled:
        assert_close(small.run(steps=4), expected, slack=20)
        graphs = {(run.step, run.graph) for run in enabled.report().runs}
    assert graphs == {(0, "dense"), (1, "sparse"), (2, "sparse"), (3, "sparse")}
    one = programs["transformer"]
    for wrong, error, message in (
        (one, ExportError, r"one given for 2 modules. Valid: a mapping with \['transformer', 'transformer_2'\]"),
        ({"transformers": one}, ExportError, r"given for \['transformers'\]. Valid"),
        ({}, ExportError, "given for"),
        ({"transformer": "file.pt2"}, TypeError, "expected what svg2_compile.transform or svg2_compile.load returns"),
        ({"transformer": one, "transformer_2": one.with_options({"step_iters": 7})}, ExportError, "different options"),
    ):
        with pytest.raises(error, match=message):
            svg2_compile.enable(small.pipe, program=wrong)
    with pytest.raises(ConfigError, match="top_p: is part of the graphs"):
        svg2_compile.enable(small.pipe, program=programs, top_p=0.5)
    with pytest.raises(ValueError, match="Valid with program: regional=False"):
        svg2_compile.enable(small.pipe, program=programs, regional=True)
    assert small.pipe.transformer._compiled_call_impl is None


def test_arguments_that_were_not_exported():
    """Defaults may be given; return_dict may differ from the export; anything else is named."""
    small = build("wan")
    module = small.pipe.transformer
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }
    with torch.no_grad():
        program = svg2_compile.transform(torch.export.export(module, (), inputs), **IDENTITY)
        expected = module(**inputs).sample
        assert_close(program(**inputs).sample, expected)  # the model's own output type
        with svg2_compile.enable(module, program=program):
            assert_close(module(**inputs, return_dict=False)[0], expected)
            assert_close(module(*inputs.values(), attention_kwargs=None).sample, expected)
            with pytest.raises(ExportError, match="encoder_hidden_states_image: the program was exported without"):
                module(**inputs, encoder_hidden_states_image=torch.zeros(1, 3, 16))
            with pytest.raises(ExportError, match=r"timestep: a tensor \[1\] of int64 on cpu given"):
                module(**{**inputs, "timestep": torch.tensor([900])})
