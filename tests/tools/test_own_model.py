"""svg2 inspect of a model in a Python file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.tools.inspect import InspectError
from svg2_compile.tools.own_model import inspect_own_model

SOURCE = """
import torch
import torch.nn as nn
import torch.nn.functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x, scale=1.0):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + scale * F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

def build():
    return Model()

def number():
    return 3

def fails():
    raise RuntimeError("no weights here")

def positional():
    return (torch.randn(1, 60, 32),)

def named():
    return {"x": torch.randn(1, 60, 32)}

def both():
    return (torch.randn(1, 60, 32),), {"scale": 2.0}
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("call", ["positional", "named", "both"])
def test_a_model_and_its_call(source: str, call: str) -> None:
    report = inspect_own_model(
        f"{source}:build", f"{source}:{call}", {"min_tokens": 0, "dense_layers": 0}, "cuda:sm_90"
    )
    assert [(site.reason, site.video_tokens) for site in report.sites] == [("sparse", 60)]
    assert "1x60x32" in report.notes[0] and "sm_90" in report.graphs[0].estimated_for


@pytest.mark.parametrize(
    ("model", "call", "says"),
    [
        ("number", "named", "expected a torch.nn.Module"),
        ("build", "number", "expected the arguments of a call"),
        ("fails", "named", "no weights here"),
        ("missing", "named", "missing"),
    ],
)
def test_what_cannot_be_inspected_says_why(source: str, model: str, call: str, says: str) -> None:
    with pytest.raises(InspectError, match=says):
        inspect_own_model(f"{source}:{model}", f"{source}:{call}")


@pytest.mark.parametrize("text", ["my_model.py", "nowhere.py:build", "my_model.txt:build"])
def test_other_forms_are_named(text: str) -> None:
    with pytest.raises(InspectError, match=r"FILE\.py:FUNCTION|no file"):
        inspect_own_model(text, text)


def test_the_command(source: str) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["inspect", f"{source}:build", "--call", f"{source}:both", "--device", "cpu"])
    assert result.exit_code == 0 and "60" in result.stdout
    assert runner.invoke(app, ["inspect", f"{source}:build"]).exit_code != 0
