"""The offline door on a CUDA device: the same file, the same results, state and weights on the device."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

import svg2_compile
from svg2_compile import ExportError
from svg2_compile.export.archive import MANIFEST
from tests.export.programs import block, block_inputs
from tests.support import IDENTITY, SELECTION, assert_close

pytestmark = pytest.mark.gpu


def on_device(dtype):
    """A block over 1,024 tokens with its inputs."""
    module = block().to("cuda", dtype)
    video, time = (value.to("cuda", dtype) for value in block_inputs(1024))
    return module, video, time


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeping_all_clusters_equals_eager(dtype, decompose, tmp_path):
    module, video, time = on_device(dtype)
    exported = torch.export.export(module, (video, time))
    exported = exported.run_decompositions() if decompose else exported
    program = svg2_compile.transform(exported, **IDENTITY)
    assert len(program.sparse_sites) == 1 and program.spec.device.type == "cuda"
    svg2_compile.save(program, tmp_path / "block.pt2")
    run = svg2_compile.load(tmp_path / "block.pt2")
    assert {value.device.type for value in run.dense.state_dict.values()} == {"cuda"}
    with torch.no_grad():
        for step in range(3):
            assert_close(run(video, time - step), module(video, time - step))
    assert [(r.graph, r.step, r.seeded) for r in run.report().runs] == [
        ("sparse", 0, False),
        ("sparse", 1, True),
        ("sparse", 2, True),
    ]


def test_the_wrong_device_is_named():
    module, video, time = on_device(torch.bfloat16)
    program = svg2_compile.transform(torch.export.export(module, (video, time)), **SELECTION)
    with pytest.raises(ExportError, match=r"video: .* on cpu given. Valid: .* on cuda"):
        program(video.cpu(), time)


def test_a_file_knows_its_device(tmp_path):
    module, video, time = on_device(torch.bfloat16)
    svg2_compile.save(svg2_compile.transform(torch.export.export(module, (video, time)), **SELECTION), tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x") as file:
        manifest = json.loads(file.read(MANIFEST))
    assert manifest["state"]["device"].startswith("cuda")


@pytest.mark.slow
def test_a_package_runs_the_same_video(tmp_path):
    module, video, time = on_device(torch.bfloat16)
    program = svg2_compile.transform(torch.export.export(module, (video, time)), **{**SELECTION, "dense_steps": 1})
    svg2_compile.package(program, tmp_path / "package.pt2")
    packaged = svg2_compile.load(tmp_path / "package.pt2")
    for step in range(3):
        assert_close(packaged(video, time - step), program(video, time - step), slack=4)
    assert [r.graph for r in packaged.report().runs] == ["dense", "sparse", "sparse"]
