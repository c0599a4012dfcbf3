"""The nodes, on a stand-in of ComfyUI's interface; and on ComfyUI itself where SVG2_COMFYUI names a checkout of it.

SVG2_COMFYUI=path/to/ComfyUI python -m pytest tests/integrations/test_comfyui.py      (with what its code imports)
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import svg2_compile
from svg2_compile.integrations.comfyui.steps import step_of, tell_steps
from svg2_compile.runtime.standing import Said, said_now
from tests.integrations import comfyui_stand_in as stand_in
from tests.support import IDENTITY, SELECTION, assert_close

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0])
WIDTH, HEADS, TOKENS = 32, 2, 160


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, options: Any) -> torch.Tensor:
        from comfy.ldm.modules import attention

        q, k, v = self.qkv(x * (1 + modulation)).chunk(3, dim=-1)
        return x + self.out(attention.optimized_attention(q, k, v, HEADS, transformer_options=options))


class Model(nn.Module):
    """Two blocks over the tokens of a latent, as ComfyUI's video models are made."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, transformer_options: Any) -> torch.Tensor:
        modulation = self.time(timestep[:, None])[:, None]
        for block in self.blocks:
            x = block(x, modulation, transformer_options)
        return x


def _nodes() -> Any:
    """As ComfyUI loads a folder of its custom_nodes: by its path, under a name of its own."""
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_comfyui", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


@pytest.fixture
def patcher(monkeypatch):
    stand_in.install(monkeypatch)
    torch.manual_seed(0)
    return stand_in.ModelPatcher(stand_in.BaseModel(Model().eval()))


def _sample(patcher: Any, seed: int = 0) -> torch.Tensor:
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    sigmas = SIGMAS.clone()
    with torch.inference_mode():
        x = x * sigmas[0]  # a sampler scales the noise
        for sigma, following in itertools.pairwise(sigmas):
            for branch in (0, 1):
                options = {
                    **patcher.model_options["transformer_options"],
                    "sample_sigmas": sigmas,
                    "sigmas": sigma[None],
                    "cond_or_uncond": [branch],
                }
                out = patcher.model.apply_model(x, sigma[None] * 1000, options)
            x = x + (following - sigma) * out
    return x


def _compiled(patcher: Any, options: dict[str, Any], blocks: bool, **inputs: Any) -> tuple[Any, Any]:
    lines = "\n".join(f"{name} = {value}" for name, value in options.items())
    arguments = {"preset": "none", "density": 0.0, "dense_steps": 0.0, "blocks": blocks, "options": lines, **inputs}
    return _nodes()["Svg2CompileModel"]().compile(patcher, **arguments)


BOTH = pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])


@BOTH
def test_equals_the_plain_model_with_all_clusters_kept(patcher, blocks):
    expected = _sample(patcher)
    compiled, _ = _compiled(patcher, IDENTITY, blocks)
    assert_close(_sample(compiled), expected, slack=20)
    assert torch.equal(_sample(patcher), expected)  # the MODEL that went in is as it was
    runs = svg2_compile.report(patcher.model.diffusion_model).runs
    assert len(runs) == 16 and {run.graph for run in runs} == {"sparse"}


@BOTH
def test_sigmas_and_conditions_tell_step_and_branch(patcher, blocks):
    compiled, handle = _compiled(patcher, {**SELECTION, "dense_steps": 1}, blocks)
    _sample(compiled)
    _sample(compiled, seed=1)
    runs = svg2_compile.report(patcher.model.diffusion_model).runs
    assert {run.source for run in runs} == {"context"}
    assert {run.branch for run in runs} == {"((0,), 0)", "((1,), 0)"}
    assert [run.reason for run in runs if run.step == 0] == ["dense_steps"] * 8
    cold = [(run.video, run.step) for run in runs if run.graph == "sparse" and not run.seeded]
    assert sorted(cold) == [(0, 1)] * 4 + [(1, 1)] * 4  # two layers and two branches in each of two videos
    shown = _nodes()["Svg2Report"]().show(handle, {"samples": None})
    assert "ran 24 sparse and 8 dense attentions" in shown["result"][1] == shown["ui"]["text"][0]


def test_inputs_of_the_node_are_options(patcher):
    compiled, _ = _compiled(
        patcher,
        {"min_tokens": 1, "inner_backend": "eager"},
        False,
        preset="wan2.1-14b-720p:quality",
        density=0.3,
        dense_steps=0.5,
    )
    _sample(compiled)
    (session,) = {
        session for session in svg2_compile.api._sessions_of(patcher.model.diffusion_model) if session.programs
    }
    config = session.config
    assert (config.preset, config.density, config.dense_steps) == ("wan2.1-14b-720p:quality", 0.3, 0.5)


@pytest.mark.parametrize(
    ("options", "blocks", "message"),
    [("densty=1", False, "Did you mean 'density'"), ("nothing", False, "Valid: name=value"), ("", True, "Valid: off")],
)
def test_mistakes_are_named(patcher, options, blocks, message):
    if blocks:
        patcher.model.diffusion_model.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match=message):
        _nodes()["Svg2CompileModel"]().compile(patcher, "none", 0.0, 0.0, blocks, options)


def test_an_override_of_another_node_is_left(patcher):
    patcher.model_options["transformer_options"]["optimized_attention_override"] = "mine"
    compiled, _ = _compiled(patcher, IDENTITY, False)
    assert compiled.model_options["transformer_options"]["optimized_attention_override"] == "mine"


def test_the_interface_of_the_nodes(patcher):
    for node in _nodes().values():
        types = node.INPUT_TYPES()
        assert set(types) <= {"required", "optional"} and callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and node.CATEGORY
    presets = _nodes()["Svg2CompileModel"].INPUT_TYPES()["required"]["preset"][0]
    assert presets[0] == "none" and "wan2.1-14b-720p:quality" in presets


@pytest.mark.parametrize(("sigma", "step"), [(1.0, 0), (0.95, 0), (0.9, 1), (0.6, 2), (0.31, 2), (0.3, 3), (0.0, 3)])
def test_a_level_between_two_belongs_to_the_step_that_left_for_it(sigma, step):
    assert step_of(sigma, SIGMAS.tolist()) == step


def test_without_a_schedule_nothing_is_said_of_steps():
    said = tell_steps()(lambda *args, **kwargs: said_now(), 0, 0, transformer_options={"cond_or_uncond": [1]})
    assert said == Said(branch=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["0", "1"], ids=["whole", "blocks"])
@pytest.mark.parametrize("model", ["wan", "hunyuan", "ltx"])
@pytest.mark.skipif("SVG2_COMFYUI" not in os.environ, reason="SVG2_COMFYUI names no checkout of ComfyUI")
def test_comfyui_itself(model, blocks):
    """Its samplers, its patchers, its models in small configurations."""
    command = [sys.executable, str(ROOT / "tests/integrations/comfyui_host.py"), os.environ["SVG2_COMFYUI"]]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, model, blocks],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.split("RESULT ")[1])
    exact, selection = results["exact"], results["selection"]
    assert exact["error"] < 1e-4 and exact["again"] < 1e-4 and exact["still_plain"] and exact["finite"]
    assert {run["graph"] for run in exact["runs"]} == {"sparse"}
    runs = selection["runs"]
    assert {run["source"] for run in runs} == {"context"}
    assert {run["step"] for run in runs if run["reason"] == "dense_steps"} <= {0}
    assert {run["step"] for run in runs if run["graph"] == "sparse" and not run["seeded"]} == {1}
