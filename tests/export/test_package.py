"""Packages: both graphs compiled ahead of time, one copy of the weights, the same results and the same clock."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from typer.testing import CliRunner

import svg2_compile
from svg2_compile import ExportError, FileDamaged
from svg2_compile.cli import app
from svg2_compile.codegen.inner_backend import inductor_problem
from svg2_compile.export.aoti import PackagedGraph
from svg2_compile.export.archive import MANIFEST
from tests.export.programs import block, block_inputs, exported_block
from tests.export.test_call import Counting, WithNumber
from tests.support import SELECTION, assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(inductor_problem("cpu") is not None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """saved.pt2, a block with any number of tokens, and packaged.pt2, what svg2 package makes of it."""
    folder = tmp_path_factory.mktemp("package")
    dynamic = ({1: Dim("tokens", min=16, max=4096)}, None)
    source = torch.export.export(block(), block_inputs(), dynamic_shapes=dynamic)
    program = svg2_compile.transform(source, **{**SELECTION, "dense_steps": 1, "step_iters": 1})
    svg2_compile.save(program, folder / "saved.pt2")
    arguments = ["package", str(folder / "saved.pt2"), "-o", str(folder / "packaged.pt2"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"]["machine code"] > 0 and facts["compiled"]["torch"] == torch.__version__.split("+")[0]
    return folder


def test_a_package_runs_the_same_videos(files):
    saved, packaged = (svg2_compile.load(files / name) for name in ("saved.pt2", "packaged.pt2"))
    for tokens in (96, 131, 96):
        video, time = block_inputs(tokens)
        for step in range(3):
            assert_close(packaged(video, time - step), saved(video, time - step))
    records = [
        [(run.graph, run.video, run.step, run.seeded, run.iters) for run in program.report().runs]
        for program in (packaged, saved)
    ]
    assert records[0] == records[1] and {record[0] for record in records[0]} == {"dense", "sparse"}
    # Machine code ran, and nothing it assumed of the sizes failed: also not with one k-means iteration.
    assert all(isinstance(graph, PackagedGraph) and graph.compiled for graph in packaged._graphs.values())
    assert all(all(graph._verdicts.values()) for graph in packaged._graphs.values())


def test_weights_exist_once(files):
    """In the file, and in memory: changing the program's tensor changes what the machine code computes."""
    with zipfile.ZipFile(files / "packaged.pt2") as file, zipfile.ZipFile(files / "saved.pt2") as saved:
        assert [name for name in file.namelist() if name not in saved.namelist()] == ["compiled.pt2"]
        assert len(file.read("compiled.pt2")) > 0
    packaged = svg2_compile.load(files / "packaged.pt2", dense_steps=1)
    video, time = block_inputs()
    before = packaged(video, time), packaged(video, time - 1)
    packaged.dense.state_dict["qkv.weight"].data.zero_()
    packaged.reset()
    after = packaged(video, time), packaged(video, time - 1)
    assert not any(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_another_backend_leaves_the_machine_code_alone(files):
    program = svg2_compile.load(files / "packaged.pt2", inner_backend="eager")
    video, time = block_inputs()
    assert torch.equal(program(video, time), svg2_compile.load(files / "saved.pt2")(video, time))
    assert not any(isinstance(graph, PackagedGraph) for graph in program._graphs.values())


def test_machine_code_for_others_is_refused(files, tmp_path):
    for what, value in (("torch", "1.0.0"), ("machine", {"device": "cpu", "AOTI_CPU_ISA": "other"})):
        with zipfile.ZipFile(files / "packaged.pt2") as source, zipfile.ZipFile(tmp_path / "other.pt2", "w") as copy:
            for name in source.namelist():
                data = source.read(name)
                if name == MANIFEST:
                    manifest = json.loads(data)
                    manifest["compiled"][what] = value
                    data = json.dumps(manifest).encode()
                copy.writestr(name, data)
        with pytest.raises(ExportError, match=f"machine code was made for {what} .*inner_backend="):
            svg2_compile.load(tmp_path / "other.pt2")
        assert svg2_compile.load(tmp_path / "other.pt2", inner_backend="eager")


def test_a_damaged_package_is_refused(files, tmp_path):
    data = bytearray((files / "packaged.pt2").read_bytes())
    data[data.find(b"compiled.pt2") + 5000] ^= 1
    (tmp_path / "damaged.pt2").write_bytes(data)
    with pytest.raises(FileDamaged, match=r"compiled\.pt2"):
        svg2_compile.load(tmp_path / "damaged.pt2")


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr("svg2_compile.export.aoti.inductor_problem", lambda device: "no C++ compiler found")
    with pytest.raises(ExportError, match="AOTInductor cannot compile for cpu here: no C\\+\\+ compiler found"):
        svg2_compile.package(svg2_compile.transform(exported_block(), **SELECTION), tmp_path / "x.pt2")


def test_what_cannot_be_packaged(tmp_path):
    """Found before a compilation."""
    numbered = torch.export.export(
        block(WithNumber), (*block_inputs(), 3), dynamic_shapes={"video": None, "time": None, "number": Dim.DYNAMIC}
    )
    counting = torch.export.export(block(Counting), block_inputs())
    for source, message in (
        (numbered, "number is a number that may change"),
        (counting, r"changes its buffers \['calls"),
    ):
        with pytest.raises(ExportError, match=message):
            svg2_compile.package(svg2_compile.transform(source, **SELECTION), tmp_path / "x.pt2")
    with pytest.raises(ExportError, match="no file name in an existing folder"):
        svg2_compile.package(svg2_compile.transform(exported_block(), **SELECTION), tmp_path / "no" / "x.pt2")
