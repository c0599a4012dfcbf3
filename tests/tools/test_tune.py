"""``svg2 tune`` as a user meets it, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.kernels.autotune import space as search_space
from svg2_compile.kernels.tuning import tables as tuning_tables
from svg2_compile.kernels.tuning.lookup import device_name, forget_tables
from svg2_compile.passes.device_profile import profile_for
from svg2_compile.settings.presets import load_presets
from svg2_compile.tools import tune as tune_command

runner = CliRunner()


@pytest.fixture(autouse=True)
def _small_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SVG2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_command, "CPU_TOKENS", 512)
    monkeypatch.setattr(tune_command, "CPU_HEADS", 1)
    forget_tables()
    yield
    forget_tables()


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("120s", 120), ("2m", 120), ("1.5 min", 90), ("1H", 3600)])
def test_budgets(text: str, seconds: float) -> None:
    assert tune_command.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3", "fast", "3 days", "s"])
def test_bad_budgets(text: str) -> None:
    result = runner.invoke(app, ["tune", "--budget", text])
    assert result.exit_code == 2
    assert "--budget is" in result.output and "120s" in result.output


def test_every_preset_can_be_tuned_for_on_any_device() -> None:
    for preset in load_presets():
        on_gpu = tune_command.workloads_for(preset, torch.device("cuda"))
        assert {workload.kernel for workload in on_gpu} == set(search_space.GPU_KERNELS)
        on_cpu = tune_command.workloads_for(preset, torch.device("cpu"))
        assert all(workload.num_tokens <= 512 and workload.num_heads == 1 for workload in on_cpu)


def test_an_unknown_preset_is_an_error_that_names_the_nearest() -> None:
    result = runner.invoke(app, ["tune", "--preset", "wan2.1-14b-720"])
    assert result.exit_code == 2
    assert "Did you mean 'wan2.1-14b-720p'?" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_so_and_tunes_the_cpu_kernels(tmp_path: Path) -> None:
    result = runner.invoke(app, ["tune", "--preset", "ltx", "--budget", "3s"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "no CUDA device here" in text and "before and after" in text
    assert "Cost model" in text and "The default settings gain from" in text
    table = tuning_tables.load_table(device_name(torch.device("cpu")), tuning_tables.cache_dir())
    assert table is not None
    assert {key.kernel for key in table.measurements} == set(search_space.CPU_KERNELS)
    assert table.profile is not None and set(table.profile) == set(tuning_tables.PROFILE_FIGURES)
    file = tmp_path / "mine.json"
    assert runner.invoke(app, ["tune", "--export", str(file)]).exit_code == 0
    exported = tuning_tables.read_table(file)
    assert exported == table
    next(tuning_tables.cache_dir().glob("*.json")).unlink()
    result = runner.invoke(app, ["tune", "--import", str(file)])
    assert result.exit_code == 0 and "taken over" in result.output
    again = tuning_tables.load_table(table.device, tuning_tables.cache_dir())
    assert again == table
    assert "measured" in profile_for(torch.device("cpu")).source


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's share")
def test_json_is_alone_on_standard_output() -> None:
    result = runner.invoke(app, ["tune", "--preset", "ltx", "--budget", "1s", "--json"])
    assert result.exit_code == 0
    entries = json.loads(result.stdout)
    assert {entry["kernel"] for entry in entries} == set(search_space.CPU_KERNELS)
    assert all(entry["best_ms"] <= entry["default_ms"] for entry in entries)


def test_nothing_to_export_is_an_error() -> None:
    result = runner.invoke(app, ["tune", "--export", "file.json"])
    assert result.exit_code == 2
    assert "run `svg2 tune` first" in result.output


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 1}'])
def test_an_import_that_is_no_table_is_an_error(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    result = runner.invoke(app, ["tune", "--import", str(file)])
    assert result.exit_code == 2
    assert "--import" in result.output and str(file) in "".join(result.output.split("\n"))


def test_choices_exclude_each_other() -> None:
    result = runner.invoke(app, ["tune", "--preset", "ltx", "--export", "file.json"])
    assert result.exit_code == 2
    assert "exclude" in result.output
