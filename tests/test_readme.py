"""The README's examples work as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.pipelines import build

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_first_example_and_explain(capsys):
    names: dict = {}
    exec(EXAMPLES[0], names)
    exec(EXAMPLES[2], names)
    shown = capsys.readouterr().out
    assert shown.count("blocks.0-1.attn1") + shown.count("blocks.1.attn1") >= 2
    assert "cross_attention" in shown and "ran 3 sparse and 1 dense" in shown


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
