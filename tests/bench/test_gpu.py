"""The GPU benchmark without a GPU: its rehearsal, and what it does with parts that fail, hang or do not fit."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import common
from bench.clustered_inputs import clustered_inputs
from bench.gpu import __main__ as command
from bench.gpu.context import Context
from bench.gpu.machine import Machine
from bench.gpu.peers import NotMeasured, make_flex
from bench.gpu.shapes import SHAPES, shapes_for
from bench.gpu.summary import GOALS, summarise
from bench.gpu.supervisor import Order, supervise
from bench.gpu.units import RESULTS, UNITS, Unit, run_unit, select_units
from bench.rewritten import Rewritten, Settings, make_inputs

CPU = torch.device("cpu")
TINY = shapes_for(rehearsal=True)


@pytest.mark.slow
def test_rehearsal_runs_everything_and_leaves_the_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    before = {path: path.stat().st_mtime_ns for path in common.RESULTS.iterdir()}
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in common.RESULTS.iterdir()} == before
    assert sorted(path.stem for path in tmp_path.iterdir()) == [f"cpu-{name.replace('_', '-')}" for name in RESULTS]
    units: dict[str, Any] = {}
    for path in tmp_path.iterdir():
        document = json.loads(path.read_text())
        assert document["rehearsal"] is True and document["environment"]["commit"] and document["inputs"]
        units |= {result["unit"]: result for result in document["results"]}
    assert set(units) == set(UNITS)
    # flash-kmeans is measured beside ours, so its absence is noted within a unit that was measured.
    assert {name for name, unit in units.items() if unit["status"] != "measured"} == {"flashinfer wan2.1-14b-720p"}
    assert "rehearsal" in printed and all(label in printed for label, *_ in GOALS)
    pytest.importorskip("matplotlib")
    from bench.gpu.plots import plot_device

    assert plot_device("cpu", tmp_path, tmp_path).stat().st_size > 10_000


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert command.main(["--rehearse", "--only", "nonsense"]) == 2
    assert "valid: a part of gate" in capsys.readouterr().err


def test_the_gate_always_comes_first() -> None:
    assert [unit.name for unit in select_units("kmeans ltx", quick=False)] == ["gate", "kmeans ltx-8k"]
    assert select_units(None, quick=False)[0].name == "gate"
    assert {unit.result for unit in UNITS.values()} == set(RESULTS)


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotMeasured("no wheel"), "not measured"), (AssertionError("wrong"), "failed"), (RuntimeError("CUDA"), "failed")],
)
def test_a_unit_records_what_happened(error: Exception, status: str) -> None:
    def fail(_: Context) -> dict[str, Any]:
        raise error

    record = run_unit(Unit("x", "kmeans", 1, fail), Context(Machine(CPU), 1, rehearsal=True))
    assert record["status"] == status
    assert str(error) in record.get("reason", record.get("error", ""))


# ------------------------------------------------------------------------------------------------------- the supervisor

# A worker that does to every unit what its name says.
WORKER = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
def tell(**event):
    with open(order["events"], "a") as file:
        file.write(json.dumps(event) + "\\n")
tell(event="environment", environment={"slug": "x"}, timing="")
for name in order["units"]:
    tell(event="start", unit=name)
    if name.startswith("crash"):
        os.abort()
    if name.startswith("hang"):
        time.sleep(60)
    status = "failed" if name.startswith("poison") else "measured"
    tell(event="end", unit=name, record={"status": status, "pid": os.getpid()})
    if status == "failed":
        sys.exit(3)
"""


def _supervise(names: list[str], tmp_path: Path, worker: str = WORKER, budget: float = 30.0) -> dict[str, Any]:
    def never(_: Context) -> dict[str, Any]:
        raise AssertionError("units run in workers only")

    units = [Unit(name, "kmeans", 0.0, never) for name in names]
    order = Order("cpu", 1, False, budget, tmp_path / "events", (sys.executable, "-c", worker))
    notified: list[str] = []
    outcome = supervise(units, order, lambda name, record: notified.append(name))
    assert sorted(notified) == sorted(outcome.records) == sorted(names)
    return outcome.records


def test_a_crash_and_a_poisoned_device_cost_no_other_unit(tmp_path: Path) -> None:
    records = _supervise(["a", "crash", "b", "poison", "c"], tmp_path)
    assert {name: record["status"] for name, record in records.items()} == {
        "a": "measured",
        "crash": "failed",
        "b": "measured",
        "poison": "failed",
        "c": "measured",
    }
    assert "exit code -6" in records["crash"]["error"]
    assert len({records[name]["pid"] for name in "abc"}) == 3


def test_a_hang_is_ended_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import supervisor

    monkeypatch.setattr(supervisor, "LEAST_SECONDS", 1.0)
    begin = time.monotonic()
    records = _supervise(["hang", "a"], tmp_path)
    assert records["a"]["status"] == "measured"
    assert records["hang"] == {"status": "failed", "error": "took too long and was ended"}
    assert time.monotonic() - begin < 20


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import supervisor

    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
    records = _supervise(["a", "hang", "b"], tmp_path, budget=2.0)
    assert records["a"]["status"] == "measured"
    assert [records[name]["status"] for name in ("hang", "b")] == ["not measured"] * 2


def test_a_worker_that_does_not_start_fails_everything_once(tmp_path: Path) -> None:
    records = _supervise(["a", "b"], tmp_path, worker="import sys; sys.exit(5)")
    assert {record["error"] for record in records.values()} == {
        "the worker did not start: it ended its process with exit code 5"
    }


# ----------------------------------------------------------------------------------------------------------- the pieces


def test_inputs_are_laid_out_as_a_model_does_and_their_density_is_as_published() -> None:
    from dataclasses import replace

    shape = replace(SHAPES["ltx-8k"], num_heads=2, dtype=torch.float32)
    tokens = clustered_inputs(shape, CPU)
    assert all(x.shape == (1, 2, 8192, 64) and x.transpose(1, 2).is_contiguous() for x in tokens)
    assert all(torch.equal(a, b) for a, b in zip(tokens, clustered_inputs(shape, CPU), strict=True))
    inputs = make_inputs(shape, tokens)
    densities = Rewritten(shape, inputs, Settings(top_p=0.9)).densities()
    assert 0.2 < densities.mean() < 0.35
    assert densities.std() > 0.01  # heads differ


@pytest.mark.parametrize(
    "settings", [Settings(density=0.3), Settings(density=0.3, compensation=True), Settings(0.3, gather_keys=True)]
)
def test_exact_rows_are_those_of_the_reference(settings: Settings) -> None:
    from svg2_compile.kernels import ops

    shape = TINY["hunyuanvideo-720p"]
    tokens = clustered_inputs(shape, CPU)
    rewritten = Rewritten(shape, make_inputs(shape, tokens), settings)
    with ops.use_implementation("reference"):
        expected, _ = rewritten.attention()
    rows = torch.tensor([0, 5, 256, 260])
    exact = rewritten.exact_rows(rows)
    assert float((expected[0][:, rows] - exact).abs().max() / exact.abs().max()) < 2**-7
    # The count of gathered keys, by the definition.
    tiles = [math.ceil(int(size) / 128) for size in rewritten.q_offsets[0, 0].diff()]
    sizes = rewritten.k_offsets[0, 0].diff()
    first_head = sum(tile * int(sizes[row].sum()) for tile, row in zip(tiles, rewritten.block_map[0, 0], strict=True))
    assert 0 < first_head < rewritten.keys_read()


@pytest.mark.parametrize("name", SHAPES)
def test_every_variant_launches_at_the_real_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of an imagined GPU: nothing is read back, and the lists fit into the default workspace."""
    from bench import rewritten
    from bench.gpu.part_attention import VARIANTS
    from svg2_compile.kernels.triton import implementation
    from svg2_compile.kernels.triton.rehearsal import record_launches

    monkeypatch.setattr(rewritten, "ops", implementation)
    shape = SHAPES[name]
    size = (1, shape.num_tokens, shape.num_heads, shape.head_dim)
    with record_launches() as (_, launches):
        tokens = [torch.empty(size, dtype=shape.dtype, device="cuda").transpose(1, 2) for _ in range(3)]
        inputs = make_inputs(shape, (tokens[0], tokens[1], tokens[2]))
        counts = {}
        for label, settings in VARIANTS.items():
            del launches[:]
            variant = Rewritten(shape, inputs, settings)
            assert variant.out.shape == tokens[0].shape and variant.out.stride() == tokens[0].stride()
            counts[label] = len(launches)
        plain = counts["density 25 %"]
        assert counts["25 %, keys gathered by k_order"] < plain < counts["25 %, compensation"]
        assert counts["25 %, compensation"] < counts["25 %, compensation, error routing"]


def test_flex_computes_the_asked_share_of_blocks() -> None:
    query, key, value = (torch.randn(1, 2, 5 * 128 + 7, 16) for _ in range(3))
    peer = make_flex(query, key, value, density=0.4)
    assert peer.num_tokens == 640 and peer.density == pytest.approx(0.4)
    assert peer.blocks.float().mean() == pytest.approx(0.4)
    rows = torch.tensor([3, 300, 639])
    torch.testing.assert_close(
        peer.run()[0][:, rows].double(), peer.exact_rows(query, key, value, rows), atol=1e-5, rtol=0
    )


def test_summary_of_nothing() -> None:
    text = summarise({"gate": {"status": "failed", "error": "wrong"}})
    assert "wrong" in text and text.count("not measured") == len(GOALS)
