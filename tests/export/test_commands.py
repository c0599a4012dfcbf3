"""svg2 transform, package and inspect: what they print, what they write, and what a user may get wrong."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import svg2_compile
from svg2_compile.cli import app
from svg2_compile.reporting.graph_picture import PictureNode, to_dot, to_svg
from tests.export.programs import block_inputs, exported_block

SETTINGS = ("min_tokens=0", "dense_layers=0", "dense_steps=0", "num_k_clusters=7", "inner_backend=eager")
SET = [argument for setting in SETTINGS for argument in ("--set", setting)]


def run(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported block, model.pt2, and what svg2 transform makes of it, sparse.pt2."""
    folder = tmp_path_factory.mktemp("commands")
    torch.export.save(exported_block(), folder / "model.pt2")
    result = run("transform", folder / "model.pt2", "-o", folder / "sparse.pt2", "--set", "top_p=0.85", *SET)
    assert result.exit_code == 0, result.output
    assert "1 of 1 attentions sparse" in result.stdout and "top_p=0.85" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    return folder


def test_the_written_file_runs(files: Path) -> None:
    loaded = svg2_compile.load(files / "sparse.pt2")
    assert loaded.config.top_p == 0.85
    video, time = block_inputs()
    mine = svg2_compile.transform(exported_block(), **dict(setting.split("=") for setting in SETTINGS), top_p=0.85)
    assert torch.equal(loaded(video, time), mine(video, time))


def test_a_preset(files: Path, tmp_path: Path) -> None:
    preset = ("--preset", "wan2.1-14b-720p:turbo", "--json")
    result = run("transform", files / "model.pt2", "--output", tmp_path / "preset.pt2", *preset, *SET)
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout)["config"]
    assert config["preset"] == "wan2.1-14b-720p:turbo" and config["num_k_clusters"] == 7
    assert svg2_compile.load(tmp_path / "preset.pt2").config.to_dict() == config


def test_inspect(files: Path) -> None:
    result = run("inspect", files / "sparse.pt2")
    assert result.exit_code == 0, result.output
    for text in ("svg2_compile 0.1.0", f"torch {torch.__version__}", "timestep: time", "2 tensors of centroids"):
        assert text in result.stdout
    data = json.loads(run("inspect", files / "sparse.pt2", "--json").stdout)
    assert data["bytes"]["file"] == (files / "sparse.pt2").stat().st_size
    assert data["bytes"]["weights"] == 12800 and data["bytes"]["machine code"] == 0
    assert data["sites"][0]["num_k_clusters"] == 7 and data["state"]["slots"][1]["shape"] == [1, 2, 7, 16]
    assert data["config"]["top_p"] == 0.85 and data["time"]["inputs"] == ["time"]
    plain = run("inspect", files / "model.pt2", "--set", "min_tokens=0", "--set", "dense_layers=0")
    assert "1 of 1 attentions sparse" in plain.stdout


def test_inspect_draws_the_rewritten_part(files: Path, tmp_path: Path) -> None:
    for suffix in ("svg", "dot"):
        result = run("inspect", files / "sparse.pt2", "--graph", tmp_path / f"graph.{suffix}")
        assert result.exit_code == 0, result.output
    picture = ElementTree.fromstring((tmp_path / "graph.svg").read_text())
    texts = [item.text for item in picture.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("svg2::kmeans", "svg2::select_blocks_by_error", "query_state", "float32 [1, 2, 7, 16]", "density"):
        assert expected in texts
    dot = (tmp_path / "graph.dot").read_text()
    assert dot.count("svg2::kmeans") == 2 and '"svg2_0_query_labels" -> "svg2_0_block_map"' in dot


def test_a_picture_has_every_box_below_what_it_reads() -> None:
    nodes = [
        PictureNode("a", ("first", "<1>"), (), "input"),
        PictureNode("b", ('say "b"',), ("a",)),
        PictureNode("late", ("late",), ()),
        PictureNode("c", ("c",), ("a", "b", "late"), "output"),
    ]
    svg = ElementTree.fromstring(to_svg(nodes, "title & more"))
    shapes = [item for item in svg.iter("{http://www.w3.org/2000/svg}rect") if item.get("x")]
    tops = {node.name: float(shape.get("y") or 0) for node, shape in zip(nodes, shapes, strict=True)}
    assert tops["a"] < tops["b"] < tops["c"] and tops["late"] == tops["b"]
    assert all(float(shape.get("x") or -1) >= 0 for shape in shapes)
    assert '"b" [label="say \\"b\\""' in to_dot(nodes, "title")
    assert ElementTree.fromstring(to_svg([], "nothing")) is not None


def test_transforming_twice_says_so(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    again = run("transform", files / "sparse.pt2", "-o", tmp_path / "again.pt2", "--set", "top_p=0.85")
    assert again.exit_code == 0, again.output
    assert "is transformed already: nothing to do" in caplog.text
    assert (tmp_path / "again.pt2").is_file()
    other = run("transform", files / "sparse.pt2", "-o", tmp_path / "other.pt2", "--set", "top_p=0.5")
    assert other.exit_code == 2 and "transformed already, with other options (top_p=0.85 -> 0.5)" in other.output
    assert not (tmp_path / "other.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transform", "missing.pt2", "-o", "x.pt2"), "MODEL: there is no file missing.pt2"),
        (("transform", "text.pt2", "-o", "x.pt2"), "is not an exported program: it is no zip archive"),
        (("transform", "zip.pt2", "-o", "x.pt2"), "is not an exported program of this PyTorch"),
        (("transform", "model.pt2", "-o", "x.pt2", "--set", "top_q=1"), "unknown option 'top_q'"),
        (("transform", "model.pt2", "-o", "x.pt2", "--set", "top_p"), "'top_p' is not NAME=VALUE"),
        (("transform", "model.pt2", "-o", "no/x.pt2"), "no/x.pt2 is no file name in an existing folder"),
        (("transform", "model.pt2", "-o", "x.pt2", "--preset", "wann"), "wann"),
        (("package", "model.pt2", "-o", "x.pt2"), "was not written by svg2_compile.save"),
        (("package", "missing.pt2", "-o", "x.pt2"), "missing.pt2 cannot be read"),
        (("inspect", "model.pt2", "--graph", "x.svg"), "--graph draws what was rewritten"),
        (("inspect", "sparse.pt2", "--graph", "x.png"), "has the suffix '.png'. Valid: .svg, .dot"),
        (("inspect", "sparse.pt2", "--graph", "x.svg", "--site", "3"), "has no sparse attention 3. Valid: 0 to 0"),
        (("inspect", "cut.pt2"), "is not an exported program"),
    ],
)
def test_mistakes_are_explained(
    files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    import zipfile

    monkeypatch.chdir(files)
    Path("text.pt2").write_text("nothing")
    with zipfile.ZipFile("zip.pt2", "w") as archive:
        archive.writestr("a/b", "c")
    Path("cut.pt2").write_bytes(Path("sparse.pt2").read_bytes()[:-40])
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output and not Path("x.pt2").exists()
