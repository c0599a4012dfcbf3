"""A density that follows a measured error, through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import svg2_compile
from svg2_compile.settings.config import ConfigError, Svg2Config
from tests.export.programs import block_inputs, exported_block
from tests.support import IDENTITY, at_timestep, first_output
from tests.zoo.models import build

OPTIONS: dict[str, Any] = {
    **IDENTITY,
    "top_p": None,
    "num_q_clusters": 12,
    "num_k_clusters": 16,
    "compensation": "first_order",
    "target_error": 0.055,
}
TIMESTEPS = (900, 800, 700, 600, 500, 400)


def check(report: Any, target: float = 0.055) -> None:
    """Every step's density is what the error of the step before makes of its."""
    for site in {run.site for run in report.runs}:
        runs = [run for run in report.runs if run.site == site and run.context == 0]
        assert [run.step for run in runs] == list(range(len(runs)))
        assert runs[0].density_asked == pytest.approx(0.1)
        budget = 0.1
        for run in runs:
            assert run.density_asked == pytest.approx(min(max(budget, 0.02), 0.5), rel=1e-5)
            assert -0.02 < run.density - run.density_asked < 0.15
            assert len(run.error_per_head[0]) == len(run.density_per_head[0])
            budget = min(max(budget * min(max(run.error / target, 0.5), 2.0), 0.02), 2.0)
        assert runs[-1].density_asked != pytest.approx(0.1, rel=0.1)  # it has moved
    assert "error" in str(report) and "sparse steps of the last video" in str(report)


@pytest.mark.parametrize(("regional", "inner_backend"), [(False, "eager"), (True, "eager"), (False, "inductor")])
def test_enabled_models(regional: bool, inner_backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    options = {**OPTIONS, "inner_backend": inner_backend}
    with svg2_compile.enable(model, regional=regional, **options) as enabled, torch.no_grad():
        for step, timestep in enumerate(TIMESTEPS):
            with svg2_compile.denoising(step=step, num_steps=len(TIMESTEPS)):
                first_output(model, at_timestep(inputs, timestep))
        check(enabled.report())


def test_the_backend_alone_and_a_second_video_that_begins_anew() -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    compiled = torch.compile(model, backend="svg2", options=OPTIONS)
    with torch.no_grad():
        videos = [[first_output(compiled, at_timestep(inputs, t)) for t in TIMESTEPS] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*videos, strict=True))


def runs(program: Any) -> list[torch.Tensor]:
    video, _ = block_inputs()
    return [program(video, torch.full((1,), float(timestep))) for timestep in TIMESTEPS]


@pytest.mark.parametrize("how", ["save", "package"])
def test_saved_programs(how: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "inner_backend": "inductor" if how == "package" else "eager"}
    program = svg2_compile.transform(exported_block(), **options)
    expected = runs(program)
    check(program.report())
    getattr(svg2_compile, how)(program, tmp_path / "block.pt2")
    loaded = svg2_compile.load(tmp_path / "block.pt2")
    for mine, theirs in zip(runs(loaded), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    check(loaded.report())
    with pytest.raises(ConfigError, match="density: is part of the graphs"):
        loaded.with_options({"density": 0.2})


@pytest.mark.parametrize("regional", [False, True])
def test_a_target_that_cannot_be_met_leaves_the_layer_dense_and_is_said(
    regional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    expected = [first_output(model, at_timestep(inputs, timestep)) for timestep in TIMESTEPS]
    with svg2_compile.enable(model, regional=regional, **{**OPTIONS, "target_error": 1e-4}) as enabled:
        with torch.no_grad():
            outputs = [first_output(model, at_timestep(inputs, timestep)) for timestep in TIMESTEPS]
        report = enabled.report()
    assert [(run.graph, run.reason) for run in report.runs if run.step == 5] == [("dense", "target_error")] * 2
    assert all(run.graph == "sparse" for run in report.runs if run.step < 5)
    torch.testing.assert_close(outputs[-1], expected[-1])
    assert caplog.text.count("cannot meet target_error=0.0001") == 1
    assert "missed target_error in some video: blocks.0.attn1, blocks.1.attn1" in " ".join(str(report).split())


@pytest.mark.parametrize(
    "options", [{"compensation": "centroid"}, {"compensation": "none", "top_p": 0.5, "min_k_ratio": 0.1}, {}]
)
def test_errors_are_measured_for_every_selection(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    options = {**OPTIONS, "target_error": None, "measure_error": True, **options}
    with svg2_compile.enable(model, **options) as enabled, torch.no_grad():
        first_output(model, at_timestep(inputs, 900))
        found = enabled.report().by_layer()
    assert len(found) == 2 and all(0.001 < (layer.error or 0) < 1 for layer in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, r"target_error=0.02 moves the density that the heads of a layer share, but budget='row'"),
        ({"density": "0.3..0.1"}, r"target_error=0.02 and density='0.3..0.1': each says"),
        ({"target_error": 1.5}, r"target_error=1.5 is not valid. Valid: a fraction in \(0, 1\) or None"),
    ],
)
def test_what_contradicts_a_target(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Svg2Config.from_options({"target_error": 0.02, **options})
    assert Svg2Config(target_error=0.02, density=0.2).sparsity_policy().density == 0.2
