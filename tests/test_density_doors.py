"""A density that changes from step to step, through every door, with one compiled graph."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import svg2_compile
from svg2_compile.export import transform as door
from svg2_compile.export.transform import run_on_program
from svg2_compile.passes.hoist_centroids import hoist_centroids
from svg2_compile.pipeline import PIPELINE, Pass
from svg2_compile.settings.config import ConfigError
from tests.export.programs import block_inputs, exported_block
from tests.support import IDENTITY, at_timestep, first_output
from tests.zoo.models import build

OPTIONS: dict[str, Any] = {
    **IDENTITY,
    "top_p": None,
    "num_q_clusters": 12,
    "num_k_clusters": 16,
    "compensation": "first_order",
    "density": "0.6, 0.4, 0.2",
}
ASKED = [0.6, 0.4, 0.2, 0.2]
TIMESTEPS = (900, 700, 500, 300)


def by_step(report: Any) -> list[tuple[float, float]]:
    """Density asked and got in every step, mean over attentions."""
    steps: dict[int, list[Any]] = {}
    for run in report.runs:
        steps.setdefault(run.step, []).append(run)
    return [
        (sum(run.density_asked for run in runs) / len(runs), sum(run.density for run in runs) / len(runs))
        for _, runs in sorted(steps.items())
    ]


def check(report: Any) -> None:
    asked, found = zip(*by_step(report), strict=True)
    assert asked == pytest.approx(ASKED)
    # One block more than asked, at most; text beside the video is never left out.
    assert all(-0.02 < got - wanted < 0.15 for wanted, got in zip(asked, found, strict=True))
    assert list(found[:3]) == sorted(found[:3], reverse=True) and found[0] - found[2] > 0.25


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("inner_backend", ["eager", "inductor"])
def test_enabled_models(regional: bool, inner_backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    options = {**OPTIONS, "inner_backend": inner_backend}
    with svg2_compile.enable(model, regional=regional, **options) as enabled, torch.no_grad():
        for step, timestep in enumerate(TIMESTEPS):
            with svg2_compile.denoising(step=step, num_steps=4):
                assert first_output(model, at_timestep(inputs, timestep)).isfinite().all()
        check(enabled.report())
        assert len(enabled.report().graphs) == 1  # nothing was compiled anew


def test_the_backend_alone() -> None:
    torch._dynamo.reset()
    model, inputs = build("wan_t2v")
    compiled = torch.compile(model, backend="svg2", options=OPTIONS)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in TIMESTEPS:
            first_output(compiled, at_timestep(inputs, timestep))
    check(svg2_compile.report(model))


def runs(program: Any) -> list[torch.Tensor]:
    video, _ = block_inputs()
    return [program(video, torch.full((1,), float(timestep))) for timestep in TIMESTEPS]


def test_a_saved_program_and_another_density_for_it(tmp_path: Path) -> None:
    program = svg2_compile.transform(exported_block(), **OPTIONS)
    expected = runs(program)
    check(program.report())
    path = tmp_path / "block.pt2"
    svg2_compile.save(program, path)
    loaded = svg2_compile.load(path)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(runs(loaded), expected, strict=True))
    check(loaded.report())
    other = svg2_compile.load(path, density=0.3)
    runs(other)
    assert {run.density_asked for run in other.report().runs} == {0.3}
    assert all(0.28 < (run.density or 0) < 0.45 for run in other.report().runs)
    for bad, message in ((None, "a mass would decide"), (2.0, "a schedule of such fractions")):
        with pytest.raises(ConfigError, match=message):
            svg2_compile.load(path, density=bad)
    with pytest.raises(ConfigError, match="density: is part of the graphs"):
        svg2_compile.transform(exported_block(), **{**OPTIONS, "density": 0.3, "budget": "row"}).with_options(
            {"density": 0.2}
        )


@pytest.mark.slow
def test_a_package_takes_the_density_too(tmp_path: Path) -> None:
    program = svg2_compile.transform(exported_block(), **{**OPTIONS, "inner_backend": "inductor"})
    svg2_compile.package(program, tmp_path / "block.pt2")
    loaded = svg2_compile.load(tmp_path / "block.pt2")
    for mine, theirs in zip(runs(loaded), runs(program), strict=True):
        torch.testing.assert_close(mine, theirs)
    check(loaded.report())


def test_a_file_from_before_the_density_was_an_input_still_loads(tmp_path: Path) -> None:
    """Such a file has the density in its graph, and no word of it in its specification."""

    def hoist(c: Any) -> None:
        c.spec = hoist_centroids(c.gm, c.sparse_sites)

    passes = (*PIPELINE[:-1], Pass("hoist_centroids", hoist, rewrites=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "run_on_program", lambda program, config: run_on_program(program, config, passes))
        program = svg2_compile.transform(exported_block(), **{**OPTIONS, "density": 0.3})
    assert program.spec is not None and not program.spec.has_budget
    svg2_compile.save(program, tmp_path / "new.pt2")
    with zipfile.ZipFile(tmp_path / "new.pt2") as new, zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("manifest.json"):
                manifest = json.loads(data)
                manifest["format_version"] = 1
                del manifest["state"]["has_budget"]
                data = json.dumps(manifest).encode()
            old.writestr(name, data)
    loaded = svg2_compile.load(tmp_path / "old.pt2")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(runs(loaded), runs(program), strict=True))
    with pytest.raises(ConfigError, match="density: is part of the graphs"):
        svg2_compile.load(tmp_path / "old.pt2", density=0.2)
