"""The example of docs/compare.md works as pasted."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def test_the_example(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # Inductor would take most of the time, and is not what is tested.
    exec(example.replace("min_tokens=0", 'min_tokens=0, inner_backend="eager"'), {})
    shown = capsys.readouterr().out
    assert "PSNR" in shown and 0 < float(shown.split()[-1]) < 1
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "maps.png").is_file()


def test_options_of_the_command_exist():
    from typer.main import get_command

    from svg2_compile.cli import app

    known = {option for parameter in get_command(app).commands["compare"].params for option in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) <= known
