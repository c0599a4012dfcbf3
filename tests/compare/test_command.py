"""svg2 compare: arguments of the shell, and what it says about wrong ones."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.compare import command
from svg2_compile.compare.capture import MapRequest
from tests.compare.conftest import HOSTILE


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *arguments])


@pytest.fixture
def asked(monkeypatch, comparison):
    """The command with the comparison already made; collects what it was asked for."""
    calls = []

    def compare(subject, maps, regional, tell, **options):
        assert callable(tell)  # the command shows how far it is
        calls.append((subject, maps, regional, options))
        return comparison

    monkeypatch.setattr(command, "compare_subject", compare)
    monkeypatch.setattr(command, "shipped_subject", lambda *arguments: arguments)
    return calls


def test_the_page_and_the_maps_are_written(asked, tmp_path, comparison):
    page = tmp_path / "report.html"
    arguments = ["--size", "8x32x48", "--seed", "7", "--set", "top_p=0.8", "--maps", "--map-layer", "2"]
    done = run("--prompt", "red brick disc up", "--steps", "9", *arguments, "-o", str(page))
    assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "report-maps.png").stat().st_size > 1000
    assert f"{comparison.psnr:.1f} dB" in done.output and str(page) in done.output.replace("\n", "")
    ((subject, maps, regional, options),) = asked
    assert subject[:5] == ("red brick disc up", 7, (8, 32, 48), 9, 3.0)
    assert maps == MapRequest(layer="2") and not regional and options == {"top_p": "0.8"}


def test_json_alone_writes_no_page(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--json")
    assert json.loads(done.stdout)["facts"]["prompt"] == HOSTILE
    assert list(tmp_path.iterdir()) == []
    assert asked[0][1] is None
    assert asked[0][0][:5] == (command.DEFAULT_PROMPT, 0, (16, 64, 64), 30, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64x64"], "--size '64x64': expected FRAMESxHEIGHTxWIDTH in pixels, such as 16x64x64"),
        (["--size", "4x0x8"], "--size '4x0x8': expected"),
        (["--size", "4x30x32"], "size=4x30x32: height and width are multiples of 4"),
        (["--prompt", "a cat"], "cannot read 'a cat'"),
        (["--set", "top_p=2"], "top_p='2' is not valid. Valid:"),
        (["--set", "topp=0.5"], "unknown option 'topp'. Did you mean 'top_p'"),
        (["--set", "top_p"], "'top_p' is not NAME=VALUE"),
        (["--preset", "nothing"], "nothing"),
        (["--steps", "1"], "--steps"),
        (["--pipeline", "no/such/folder"], "--prompt is missing: --pipeline needs one"),
        (["--pipeline", "no/such/folder", "--prompt", "x"], "--pipeline 'no/such/folder' cannot be loaded"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    done = run(*arguments, "-o", str(tmp_path / "x.html"))
    assert done.exit_code == 2
    words = " ".join(done.output.replace("│", " ").split())
    assert message in words
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_gets_its_arguments(asked, monkeypatch):
    import diffusers

    from tests.e2e.pipelines import build

    small = build("wan")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda path, **_: small.pipe)
    arguments = ["--pipeline", "folder", "--prompt", "a cat", "--size", "5x64x80", "--steps", "4", "--guidance", "5"]
    assert run(*arguments, "--regional", "--json").exit_code == 0
    subject, _, regional, _ = asked[0]
    expected = {"num_frames": 5, "height": 64, "width": 80, "num_inference_steps": 4, "guidance_scale": 5.0}
    assert subject.facts == {"seed": 0, "prompt": "a cat", **expected} and regional
    assert subject.name == "WanPipeline" and subject.latent
