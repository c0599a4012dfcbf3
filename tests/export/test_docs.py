"""The examples of docs/export.md work as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import svg2_compile
from tests.support import assert_close
from tests.zoo.models import build

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, IN_README = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    for name in ("docs/export.md", "README.md")
)


@pytest.fixture(autouse=True)
def _eager(monkeypatch, tmp_path):
    """Inductor's code is not what is shown, and takes a minute."""
    transform = svg2_compile.transform
    monkeypatch.setattr(
        svg2_compile,
        "transform",
        lambda *args, **kwargs: transform(*args, inner_backend="eager", **kwargs),
        raising=False,
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_transform_save_load(capsys):
    exec(EXAMPLES[0], {})
    exec(EXAMPLES[1], {})
    assert "ran 6 sparse and 2 dense attentions" in capsys.readouterr().out
    assert Path("wan_svg2.pt2").is_file()


def test_in_a_pipeline(capsys):
    exec(EXAMPLES[2], {})
    shown = capsys.readouterr().out
    # Two layers; four steps, of which the first is dense; two guidance branches.
    assert "ran 12 sparse and 4 dense attentions" in shown
    assert len(EXAMPLES) == 3


def test_the_section_in_the_readme():
    """With a small model under the names of the README's first example."""
    (example,) = [text for text in IN_README if "svg2_compile.load" in text]
    model, inputs = build("wan_t2v")
    names = {"torch": torch, "svg2_compile": svg2_compile, "model": model}
    names |= {"video": inputs["hidden_states"], "text": inputs["encoder_hidden_states"]}
    exec(example, names)
    with torch.no_grad():
        expected = model(names["video"], torch.tensor([999]), names["text"], return_dict=False)[0]
    assert_close(names["out"], expected)
