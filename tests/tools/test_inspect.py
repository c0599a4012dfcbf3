"""svg2 inspect: classes without memory, exported programs, and what a user may get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from svg2_compile.cli import app
from svg2_compile.tools.example_inputs import VideoShape
from svg2_compile.tools.inspect import InspectError, inspect_class, inspect_exported, parse_input, read_config

WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 128,
}


class Block(nn.Module):
    """Self-attention over tokens [B, N, 32] with 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = self.qkv(hidden_states).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WAN))
    return path


def _run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["inspect", *arguments])


def test_class_with_configuration(config_file: Path) -> None:
    arguments = ("--config", str(config_file), "--frames", "4", "--height", "16", "--width", "32")
    result = _run(
        "diffusers.WanTransformer3DModel", *arguments, "--option", "min_tokens=0", "--option", "dense_layers=0"
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "2 of 4 attentions sparse" in result.stdout
    assert "cross_attention" in result.stdout
    assert "512" in result.stdout  # 4 x 8 x 16 tokens


def test_json(config_file: Path) -> None:
    result = _run("diffusers.WanTransformer3DModel", "--config", str(config_file), "--option", "min_tokens=0", "--json")
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout)["sites"]
    assert [site["reason"] for site in sites if "attn2" in site["name"]] == ["cross_attention"] * 2
    assert {site["video_tokens"] for site in sites if "attn1" in site["name"]} == {21 * 45 * 80}


def test_a_model_larger_than_memory() -> None:
    """Wan's default configuration: 14 billion parameters, 28 GB of weights, here with two layers of that size."""
    report = inspect_class("diffusers.WanTransformer3DModel", {"num_layers": 2}, options={"dense_layers": 0})
    assert [site.decision for site in report.sites if "attn1" in site.name] == ["sparse", "sparse"]
    assert report.sites[0].num_heads == 40


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_model_that_asks_for_values_is_reported_as_far_as_it_came() -> None:
    """Mochi picks the valid text tokens by their mask, which an inspection does not know."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
    }
    video = VideoShape(frames=2, height=16, width=16, text_tokens=16)
    report = inspect_class("diffusers.MochiTransformer3DModel", config, video, options={"min_tokens": 0})
    assert report.sites
    assert any("values" in note for note in report.notes)


def test_equal_layers_are_traced_once_and_all_reported() -> None:
    report = inspect_class("diffusers.WanTransformer3DModel", {**WAN, "num_layers": 12}, VideoShape(4, 16, 32))
    assert [site.name for site in report.sites if "attn1" in site.name] == [f"blocks.{i}.attn1" for i in range(12)]
    assert any("of 12 x blocks, all equal, the first 3 were traced" in note for note in report.notes)


def test_the_device_that_is_asked_about_decides() -> None:
    """At 4,096 tokens of 12 narrow heads a CPU gains nothing; which GPU is asked changes what is predicted."""
    wan = {**WAN, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 64, "rope_max_seq_len": 1024}
    speeds = {}
    for device in ("cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100"):
        report = inspect_class("diffusers.WanTransformer3DModel", wan, VideoShape(), device=device)
        site = next(site for site in report.sites if site.name == "blocks.1.attn1")
        assert site.decision == "sparse" and site.expected_density == 0.1
        assert (site.workspace_mb is None) == (device == "cpu")
        speeds[device] = site.predicted_speedup
        assert f"predicted for {'cpu' if device == 'cpu' else ''}" in str(report)
    assert speeds["cuda:sm_100"] == speeds["cuda:sm_90"] != speeds["cuda:sm_80"] != speeds["cpu"]
    assert "predicted for sm_90" in str(report).replace("\n", " ")


def test_presets_are_settings() -> None:
    result = _run("diffusers.WanTransformer3DModel", "--preset", "wan2.1-14b-720p:turbo", "--json")
    assert result.exit_code == 0, result.output
    clusters = {(site["num_q_clusters"], site["num_k_clusters"]) for site in json.loads(result.stdout)["sites"]}
    assert (200, 500) in clusters


def test_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "block.pt2"
    torch.export.save(torch.export.export(Block(), (torch.zeros(1, 600, 32),)), path)
    report = inspect_exported(path, {"min_tokens": 0, "dense_layers": 0})
    assert [(site.decision, site.video_tokens, site.num_heads) for site in report.sites] == [("sparse", 600, 2)]
    result = _run(str(path), "--option", "min_tokens=1000")
    assert result.exit_code == 0
    assert "short_sequence" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WanTransformer3DModel"], "neither a .pt2 file nor an import path"),
        (["diffusers.NoSuchModel"], "cannot be imported"),
        (["no_such_package.Model"], "cannot be imported"),
        (["torch.nn.functional.relu"], "no torch.nn.Module class"),
        (["torch.nn.Linear"], "Give its arguments with --config"),
        (["missing.pt2"], "no file missing.pt2"),
        (["diffusers.WanTransformer3DModel", "--option", "top_pp=1"], "Did you mean 'top_p'"),
        (["diffusers.WanTransformer3DModel", "--option", "top_p"], "is not NAME=VALUE"),
        (["diffusers.WanTransformer3DModel", "--dtype", "float17"], "'float17' is not a dtype"),
        (["diffusers.WanTransformer3DModel", "--config", "missing.json"], "missing.json"),
        (["diffusers.WanTransformer3DModel", "--device", "cuda:sm_20"], "Valid: 'cpu', 'cuda', 'cuda:sm_80'"),
        (["diffusers.WanTransformer3DModel", "--device", "tpu"], "device='tpu' is not known"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_text("nothing")
    with pytest.raises(InspectError, match="not an exported program"):
        inspect_exported(path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InspectError, match="expected a JSON object, got list"):
        read_config(tmp_path / "list.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InspectError, match=r"bad\.json"):
        read_config(tmp_path / "bad.json")


def test_parse_input() -> None:
    tensor = parse_input("x", "1x16,4:bfloat16")
    assert (tuple(tensor.shape), tensor.dtype) == ((1, 16, 4), torch.bfloat16)
    assert parse_input("t", ":int64").ndim == 0
    assert (parse_input("n", "21"), parse_input("f", "0.5"), parse_input("b", "True")) == (21, 0.5, True)
    for bad in ("1x2", "[1]", "axb:float32", "1:nothing", ""):
        with pytest.raises(InspectError, match="--input x="):
            parse_input("x", bad)
