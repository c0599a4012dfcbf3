"""The command line: output, exit codes, and that help costs no PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.settings.presets import load_presets
from svg2_compile.tools import doctor


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    runner = CliRunner()

    def invoke(*arguments: str) -> Any:
        return runner.invoke(app, list(arguments))

    return invoke


def _widest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def test_presets_list_fits_a_terminal(run: Any) -> None:
    result = run("presets", "list")
    assert result.exit_code == 0
    assert _widest(result.stdout) <= 80
    assert "…" not in result.stdout
    assert all(name in result.stdout for name in load_presets())


def test_presets_list_json(run: Any) -> None:
    data = json.loads(run("presets", "list", "--json").stdout)
    assert [row["name"] for row in data] == list(load_presets())
    assert {row["status"] for row in data} == {"published", "untested"}


def test_presets_show(run: Any) -> None:
    result = run("presets", "show", "hunyuanvideo-720p/quality")
    assert result.exit_code == 0
    assert _widest(result.stdout) <= 80
    for text in ("400", "1000", "published", "SVG2 scripts", 'options={"preset": "hunyuanvideo-720p:quality"}'):
        assert text in result.stdout
    shown = json.loads(run("presets", "show", "hunyuanvideo-720p/quality", "--json").stdout)
    assert shown["settings"]["num_q_clusters"] == 400


def test_presets_show_unknown(run: Any) -> None:
    result = run("presets", "show", "hunyuan")
    assert result.exit_code == 2
    assert "Did you mean" in result.output
    assert "hunyuanvideo-720p" in result.output


def test_doctor(run: Any) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert _widest(result.stdout) <= 80
    assert "numbers on cpu" in result.stdout
    data = json.loads(run("doctor", "--json").stdout)
    assert data["healthy"] is True
    checks = {check["name"]: check["status"] for check in data["checks"]}
    assert checks["numbers on cpu"] == "ok"
    assert checks['backend="svg2"'] == "ok"
    assert data["versions"]["torch"]


@pytest.mark.parametrize("error", [0.5, float("inf")])
def test_doctor_fails_on_wrong_numbers(run: Any, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(doctor, "sparse_error", lambda device: error)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["healthy"] is False


def test_doctor_reports_an_operator_that_raises(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: object) -> float:
        raise RuntimeError("kernel exploded")

    monkeypatch.setattr(doctor, "sparse_error", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "kernel exploded" in result.stdout


def test_a_missing_compiler_is_a_warning_only(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "inductor_problem", lambda device_type: "no C++ compiler found")
    monkeypatch.setattr(doctor, "sparse_error", lambda device: 0.0)
    result = run("doctor", "--json")
    assert result.exit_code == 0
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["Inductor on cpu"]["status"] == "warning"
    assert "no C++ compiler" in checks["Inductor on cpu"]["detail"]


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\nfrom svg2_compile.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('TORCH' if 'torch' in sys.modules else 'QUICK')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("QUICK")


def test_every_command_has_help(run: Any) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
