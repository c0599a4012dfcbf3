"""First-order compensation with one budget for all heads, through every door that a graph comes in by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import svg2_compile
from tests.export.programs import block, block_inputs, exported_block
from tests.support import IDENTITY, at_timestep, first_output
from tests.zoo.models import build

EVERYTHING: dict[str, Any] = {**IDENTITY, "compensation": "first_order", "top_p": None, "density": 1.0}
A_THIRD = {**EVERYTHING, "density": 0.3}


def densities(report: Any) -> list[float]:
    """Mean over heads of every sparse call."""
    return [float(run.density) for run in report.runs if run.graph == "sparse"]


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video"])
def test_a_compiled_model_with_everything_selected_is_the_dense_one(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = build(name)
    compiled = torch.compile(model, backend="svg2", options=EVERYTHING)
    with torch.no_grad():
        expected, actual = first_output(model, inputs), first_output(compiled, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_block_compiled_alone_with_changing_sizes_keeps_the_density_of_the_layer() -> None:
    torch._dynamo.reset()
    module = block()
    compiled = torch.compile(module, backend="svg2", options=A_THIRD, dynamic=True)
    with torch.no_grad():
        for tokens in (96, 120):
            video, time = block_inputs(tokens)
            out = compiled(video, time)
            assert out.isfinite().all() and out.shape == video.shape
    found = densities(svg2_compile.report(module))
    assert found
    assert all(0.2 < density < 0.55 for density in found)


def test_a_saved_program_computes_what_it_computed_before(tmp_path: Path) -> None:
    program = svg2_compile.transform(exported_block(), **A_THIRD)
    svg2_compile.save(program, tmp_path / "block.pt2")
    loaded = svg2_compile.load(tmp_path / "block.pt2")
    video, _ = block_inputs()
    for step in (900.0, 700.0, 500.0):
        time = torch.full((1,), step)
        assert torch.equal(loaded(video, time), program(video, time))
    assert densities(loaded.report()) == densities(program.report())
    everything = svg2_compile.transform(exported_block(), **EVERYTHING)
    torch.testing.assert_close(everything(*block_inputs()), block()(*block_inputs()), rtol=1e-4, atol=1e-5)


def test_steps_carry_their_centroids() -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    compiled = torch.compile(model, backend="svg2", options=A_THIRD)
    with torch.no_grad():
        for timestep in (900, 700, 500):
            assert first_output(compiled, at_timestep(inputs, timestep)).isfinite().all()
    runs = [run for run in svg2_compile.report().runs if run.graph == "sparse"]
    assert {run.seeded for run in runs} == {False, True}
