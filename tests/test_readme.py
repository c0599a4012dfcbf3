"""The README's examples work as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import svg2_compile
from tests.e2e.pipelines import build
from tests.support import SELECTION

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_first_example_and_explain(capsys):
    names: dict = {}
    exec(EXAMPLES[0], names)
    exec(EXAMPLES[2], names)
    shown = capsys.readouterr().out
    assert shown.count("blocks.0-1.attn1") + shown.count("blocks.1.attn1") >= 2
    assert "cross_attention" in shown and "ran 6 sparse and 2 dense" in shown


def test_the_pipeline_example(capsys):
    small = build("wan")

    def pipe_call(prompt):
        assert prompt
        small.run()
        return small

    class Pipe:
        """The small pipeline behind the call of the example, which gives a prompt."""

        def __init__(self) -> None:
            self.components = small.pipe.components
            self.scheduler = small.pipe.scheduler
            self.frames = None

        __call__ = staticmethod(lambda prompt: type("Output", (), {"frames": pipe_call(prompt)}))

    exec(EXAMPLES[1].replace("regional=True", 'regional=True, inner_backend="eager"'), {"pipe": Pipe()})
    assert "attn1" in capsys.readouterr().out
    assert small.pipe.transformer.blocks[0]._compiled_call_impl is None


def test_the_example_of_calls_that_say_where_they_stand():
    (example,) = [text for text in EXAMPLES if "denoising(" in text]
    small = build("wan")
    names = {
        "svg2_compile": svg2_compile,
        "model": small.pipe.transformer,
        "video": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([500]),
        "text": small.arguments["prompt_embeds"],
    }
    with torch.no_grad(), svg2_compile.enable(small.pipe.transformer, **SELECTION) as enabled:
        exec(example, names)
        runs = enabled.report().runs
    assert {(run.request, run.step, run.branch, run.source) for run in runs} == {("a", 7, "('cond', 0)", "context")}
