"""save and load: the same program again, weights once, nothing that runs in reading, and a reason for every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import svg2_compile
from svg2_compile import ExportError, FileDamaged
from svg2_compile.export import archive
from svg2_compile.export.archive import MANIFEST
from svg2_compile.passes import block_attention
from svg2_compile.settings.config import ConfigError
from tests.export.programs import block, block_inputs, changed_manifest, exported, exported_block, runs_of
from tests.support import SELECTION, at_timestep, first_output
from tests.zoo.models import build

TIMESTEPS = (900, 900, 700, 500, 900)
OPTIONS = {**SELECTION, "top_p": 0.9}
NAMES = ("wan_t2v", "hunyuan_video", "ltx_video", "mochi")

# Loads every program in a process that has never seen the model, and runs two videos.
FRESH = """
import sys, torch, svg2_compile
for path in sys.argv[1:]:
    run = svg2_compile.load(path)
    calls = torch.load(path + ".inputs")
    outputs = [run(**call)[0] for call in calls]
    records = [(r.graph, r.video, r.step, r.context, r.seeded, r.iters) for r in run.report().runs]
    torch.save({"outputs": outputs, "records": records}, path + ".outputs")
assert "tests" not in sys.modules and "diffusers" not in sys.modules
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved block."""
    path = tmp_path_factory.mktemp("saved") / "block.pt2"
    svg2_compile.save(svg2_compile.transform(exported_block(), **SELECTION), path)
    return path


@pytest.mark.slow
def test_a_fresh_process_runs_the_same_videos(tmp_path):
    expected = {}
    for name in NAMES:
        path = tmp_path / f"{name}.pt2"
        program = svg2_compile.transform(exported(name, "strict" if name == "mochi" else "as exported"), **OPTIONS)
        svg2_compile.save(program, path)
        _, inputs = build(name)
        calls = [at_timestep(inputs, timestep) for timestep in TIMESTEPS]
        torch.save(calls, f"{path}.inputs")
        outputs = [first_output(program, call) for call in calls]
        records = [(r.graph, r.video, r.step, r.context, r.seeded, r.iters) for r in program.report().runs]
        expected[path] = outputs, records
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, *map(str, expected)], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for path, (outputs, records) in expected.items():
        found = torch.load(f"{path}.outputs")
        assert [tuple(record) for record in found["records"]] == records
        assert {record[1] for record in records} == {0, 1}
        for mine, theirs in zip(found["outputs"], outputs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_weights_are_stored_once(tmp_path):
    """Two graphs and one copy of the weights: no larger than PyTorch's file with one graph, plus the second graph."""
    module = torch.nn.Sequential()
    module.block = block()
    module.block.qkv = torch.nn.Sequential(torch.nn.Linear(32, 4096), torch.nn.Linear(4096, 96))
    module.forward = module.block.forward
    source = torch.export.export(module, block_inputs())
    weights = sum(value.untyped_storage().nbytes() for value in source.state_dict.values())
    svg2_compile.save(svg2_compile.transform(source, **SELECTION), tmp_path / "mine.pt2")
    torch.export.save(source, tmp_path / "theirs.pt2")
    mine, theirs = ((tmp_path / name).stat().st_size for name in ("mine.pt2", "theirs.pt2"))
    assert weights < mine < weights + 64 * 1024
    assert mine < theirs


def test_tied_and_sliced_weights(tmp_path):
    module = block()
    whole = torch.randn(1000, 32)
    module.qkv.weight = torch.nn.Parameter(whole[:96])  # a part of something larger: the rest is not stored
    module.tied = torch.nn.Linear(32, 96)
    module.tied.weight = module.qkv.weight
    module.forward = lambda video, time: module.attend(video, time) + module.tied(video).sum()
    program = svg2_compile.transform(torch.export.export(module, block_inputs()), **SELECTION)
    svg2_compile.save(program, tmp_path / "tied.pt2")
    again = svg2_compile.load(tmp_path / "tied.pt2")
    assert (tmp_path / "tied.pt2").stat().st_size < 40_000
    pointers = {name: value.data_ptr() for name, value in again.dense.state_dict.items()}
    assert pointers["qkv.weight"] == pointers.get("tied.weight", pointers["qkv.weight"])
    assert torch.equal(again(*block_inputs()), program(*block_inputs()))
    assert again.sparse.state_dict["qkv.weight"].data_ptr() == pointers["qkv.weight"]
    assert isinstance(again.dense.state_dict["qkv.weight"], torch.nn.Parameter)


def test_dynamic_programs_and_their_conditions(tmp_path):
    dynamic = ({1: torch.export.Dim("tokens", min=16, max=4096)}, None)
    program = svg2_compile.transform(
        torch.export.export(block(), block_inputs(), dynamic_shapes=dynamic), **{**SELECTION, "dense_steps": 1}
    )
    svg2_compile.save(program, tmp_path / "dynamic.pt2")
    again = svg2_compile.load(tmp_path / "dynamic.pt2")
    for tokens in (96, 131):
        video, time = block_inputs(tokens)
        for step in range(3):
            assert torch.equal(again(video, time - step), program(video, time - step))
    assert runs_of(again.report()) == runs_of(program.report())
    with pytest.raises(ExportError, match="Valid: 16 to 4096"):
        again(*block_inputs(8))


def test_the_file_tells_what_it_is(saved):
    with zipfile.ZipFile(saved) as file:
        manifest = json.loads(file.read(MANIFEST))
        names = file.namelist()
    assert manifest["format_version"] == 2
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["config"]["top_p"] == SELECTION["top_p"] and manifest["config"]["dump_dir"] is None
    assert [site["decision"] for site in manifest["sites"]] == ["sparse"]
    assert [slot["shape"] for slot in manifest["state"]["slots"]] == [[1, 2, 5, 16], [1, 2, 7, 16]]
    assert manifest["time"] == {"kind": "timestep", "inputs": ["time"]}
    assert "svg2.kmeans.default" in manifest["operators"]
    assert set(manifest["entries"]) == set(names) - {MANIFEST}
    text = saved.read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # stack traces stay at home


def test_loaded_programs_save_and_transform_again(saved, tmp_path, caplog):
    program = svg2_compile.load(saved)
    svg2_compile.save(program, tmp_path / "again.pt2")
    video, time = block_inputs()
    assert torch.equal(svg2_compile.load(tmp_path / "again.pt2")(video, time), program(video, time))
    assert svg2_compile.transform(program) is program
    assert svg2_compile.transform(program, top_p=SELECTION["top_p"]) is program
    assert "is transformed already: nothing to do" in caplog.text
    with pytest.raises(ExportError, match=r"other options \(top_p=0.6 -> 0.5\)"):
        svg2_compile.transform(program, top_p=0.5)
    again = svg2_compile.transform(program.dense, **{**SELECTION, "top_p": 0.5})
    assert again.config.top_p == 0.5


def test_the_same_program_gives_the_same_bytes(tmp_path):
    program = svg2_compile.transform(exported_block(), **SELECTION)
    for name in ("one", "two"):
        svg2_compile.save(program, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_run_time_options(saved):
    program = svg2_compile.load(saved, dense_steps=1, kmeans_iter_step=4)
    video, time = block_inputs()
    for step in range(3):
        program(video, time - step)
    assert [(run.graph, run.iters) for run in program.report().runs] == [("dense", 0), ("sparse", 3), ("sparse", 4)]
    with pytest.raises(ConfigError, match="top_p: is part of the graphs"):
        svg2_compile.load(saved, top_p=0.5)
    with pytest.raises(ConfigError, match="Did you mean 'dense_steps'"):
        svg2_compile.load(saved, dense_step=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(format_version=3), ExportError, r"format version 3, written by .* Valid: up to 2"),
        (lambda m: m["versions"].update(torch="99.1.0"), ExportError, "saved with PyTorch 99.1.0"),
        (lambda m: m["operators"].update({"svg2.gone.default": "x"}), ExportError, "svg2.gone.default is not in"),
        (lambda m: m["operators"].update({"lib.op.default": "x"}), ExportError, "the library that registers lib"),
        (lambda m: m["operators"].update({"svg2.kmeans.default": "x"}), ExportError, "kmeans.default was x, and is"),
        (lambda m: m["operators"].update({"svg2.kmeans.default": "svg2::kmeans(Tensor x) -> Tensor"}), ExportError,
         r"kmeans.default was svg2::kmeans\(Tensor x\)"),
        (lambda m: m["config"].update(top_p=7), ExportError, "its configuration is not valid here"),
        (lambda m: m["config"].update(new_option=7), ExportError, "unknown option 'new_option'"),
        (lambda m: m["state"]["slots"][0].update(shape=[1, 2, 6, 16]), FileDamaged, "state svg2_0_query_state is"),
        (lambda m: m["state"]["slots"][1].update(name="nothing"), FileDamaged, "the state nothing is"),
        (lambda m: m.update(state=None), FileDamaged, "state specification without a sparse graph"),
        (lambda m: m.pop("time"), FileDamaged, "its manifest is incomplete"),
        (lambda m: m.pop("tensors"), FileDamaged, "it is incomplete: KeyError: 'tensors'"),
        (lambda m: m.update(format="other"), FileDamaged, "not that of a program"),
        (lambda m: m["entries"].pop("graphs/sparse.json"), FileDamaged, "entries .*sparse"),
        (lambda m: m["entries"]["graphs/dense.json"].update(sha256="0"), FileDamaged, "dense.json does not have its"),
        (lambda m: m["tensors"]["state"]["qkv.weight"].update(shape=[9999, 32]), FileDamaged, "qkv.weight .* reaches"),
        (lambda m: m["tensors"]["state"]["qkv.weight"].update(dtype="float3"), ExportError, "the dtype float3"),
        (lambda m: m["tensors"]["state"]["qkv.weight"].update(device="cuda:77"), ExportError, "runs on cuda:77"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(saved, tmp_path, change, error, message):
    changed = changed_manifest(saved, tmp_path / "changed.pt2", change)
    with pytest.raises(error, match=message):
        svg2_compile.load(changed)


def test_operators_that_have_got_more_arguments_since_serve_older_files(tmp_path, monkeypatch):
    monkeypatch.setattr(block_attention, "starts_from_all_clusters", lambda device: False)  # as it was once
    program = svg2_compile.transform(exported_block(), **{**SELECTION, "top_p": None, "density": 0.3})
    svg2_compile.save(program, tmp_path / "new.pt2")
    name, later = "svg2.first_order_terms.default", ", Tensor? residual_of_all=None"

    def without(manifest):
        assert later in manifest["operators"][name]
        manifest["operators"][name] = manifest["operators"][name].replace(later, "")

    def with_another_meaning(manifest):
        manifest["operators"][name] = manifest["operators"][name].replace(later, "=1.0")

    video, time = block_inputs()
    older = changed_manifest(tmp_path / "new.pt2", tmp_path / "older.pt2", without)
    torch.testing.assert_close(svg2_compile.load(older)(video, time), program(video, time))
    other = changed_manifest(tmp_path / "new.pt2", tmp_path / "other.pt2", with_another_meaning)
    with pytest.raises(ExportError, match="a new transform"):
        svg2_compile.load(other)


def test_files_of_others(tmp_path):
    text = tmp_path / "text.pt2"
    text.write_text("nothing")
    with pytest.raises(FileDamaged, match="no archive, truncated or damaged"):
        svg2_compile.load(text)
    torch.export.save(exported_block(), tmp_path / "plain.pt2")
    with pytest.raises(ExportError, match="not written by svg2_compile"):
        svg2_compile.load(tmp_path / "plain.pt2")
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        svg2_compile.load(tmp_path / "missing.pt2")


def test_a_crash_leaves_what_was_there(saved, tmp_path, monkeypatch):
    target = tmp_path / "program.pt2"
    target.write_bytes(b"before")
    program = svg2_compile.load(saved)
    for broken in ("finish", "add"):
        with monkeypatch.context() as patch:
            patch.setattr(archive.ArchiveWriter, broken, _interrupted)
            with pytest.raises(KeyboardInterrupt):
                svg2_compile.save(program, target)
        assert target.read_bytes() == b"before" and os.listdir(tmp_path) == ["program.pt2"]
    svg2_compile.save(program, target)
    assert os.listdir(tmp_path) == ["program.pt2"] and svg2_compile.load(target)
    with pytest.raises(ExportError, match="no file name in an existing folder"):
        svg2_compile.save(program, tmp_path / "no" / "folder.pt2")


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_only_transformed_programs_are_saved(tmp_path):
    with pytest.raises(TypeError, match="got ExportedProgram"):
        svg2_compile.save(exported_block(), tmp_path / "x.pt2")
    with pytest.raises(TypeError, match="got str"):
        svg2_compile.package("program", tmp_path / "x.pt2")
    assert os.listdir(tmp_path) == []
