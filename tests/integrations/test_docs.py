"""The examples of the pages about hosts work as pasted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

from tests.e2e.pipelines import build
from tests.integrations import comfyui_stand_in as stand_in
from tests.integrations.test_comfyui import Model, _sample

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _run(page: str, **names: Any) -> dict[str, Any]:
    for example in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(example, names)
    return names


def test_attention(capsys):
    _run("attention.md")
    assert "ran 12 sparse and 4 dense attentions" in capsys.readouterr().out


def test_diffusers(capsys):
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    small = build("wan")
    arguments = {**small.arguments, "num_inference_steps": 3, "output_type": "latent"}
    _run("diffusers.md", pipe=small.pipe, arguments=arguments)
    report = capsys.readouterr().out
    assert "blocks.0-2.attn1" in report and "stay dense by" not in report
    assert small.pipe.transformer._compiled_call_impl is None


def test_vllm_omni(capsys, monkeypatch):
    monkeypatch.setattr("svg2_compile.integrations.vllm_omni.plugin._states", {})
    _run("vllm_omni.md")
    assert "ran 2 sparse and 1 dense attentions" in capsys.readouterr().out


def test_comfyui(capsys, monkeypatch):
    stand_in.install(monkeypatch)
    torch.manual_seed(0)
    model = stand_in.ModelPatcher(stand_in.BaseModel(Model().eval()))
    page = (DOCS / "comfyui.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = example.replace('options="', 'options="inner_backend=eager\\n')
    before, after = example.split("# ... a sampler")
    names: dict[str, Any] = {"model": model}
    exec(before, names)
    _sample(names["sparse"])
    exec(after.partition("\n")[2], names)
    assert "sparse" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["attention.md", "diffusers.md", "vllm_omni.md", "comfyui.md", "composing.md"])
def test_pages_are_found(page):
    """From the README."""
    assert f"docs/{page}" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
