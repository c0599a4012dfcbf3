"""Inputs derived from signatures and configurations, on diffusers' classes and on classes of our own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svg2_compile.tools.example_inputs import InputsNotFound, VideoShape, find_inputs

SMALL = VideoShape(frames=3, height=8, width=12, text_tokens=10)

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 1,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 10,
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": 24,
}
MOCHI = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 4,
}


def _find(cls: type[nn.Module], config: dict[str, Any], video: VideoShape = SMALL, **given: Any) -> dict[str, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = cls(**config).eval()
        return find_inputs(module, getattr(module, "config", config), video, given, torch.float32)


@pytest.mark.parametrize(
    ("name", "config", "latents", "text"),
    [
        ("WanTransformer3DModel", WAN, (1, 4, 3, 8, 12), (1, 10, 16)),
        ("CogVideoXTransformer3DModel", COG, (1, 3, 4, 8, 12), (1, 10, 8)),
        ("LTXVideoTransformer3DModel", LTX, (1, 288, 4), (1, 10, 24)),
        ("MochiTransformer3DModel", MOCHI, (1, 4, 3, 8, 12), (1, 10, 24)),
    ],
)
@pytest.mark.filterwarnings("ignore:CPU Autocast")
def test_finds_the_layout(name: str, config: dict[str, Any], latents: tuple[int, ...], text: tuple[int, ...]) -> None:
    inputs = _find(getattr(diffusers, name), config)
    assert tuple(inputs["hidden_states"].shape) == latents
    assert tuple(inputs["encoder_hidden_states"].shape) == text
    assert inputs["return_dict"] is False


def test_sizes_come_from_the_configuration_where_it_tells() -> None:
    inputs = _find(diffusers.CogVideoXTransformer3DModel, COG, VideoShape())
    assert tuple(inputs["hidden_states"].shape) == (1, 3, 4, 8, 12)  # 9 frames, compressed by 4: 1 + 2 x 4
    assert inputs["encoder_hidden_states"].shape[1] == 10


def test_a_billion_parameters_cost_no_memory() -> None:
    inputs = _find(diffusers.WanTransformer3DModel, {}, VideoShape())
    assert tuple(inputs["hidden_states"].shape) == (1, 16, 21, 90, 160)


class Masked(nn.Module):
    """Wants a boolean mask and packed tokens, and text of a width that no key names."""

    def forward(self, hidden_states: Tensor, encoder_attention_mask: Tensor, style: Tensor | None = None) -> Tensor:
        if hidden_states.ndim != 3 or encoder_attention_mask.dtype != torch.bool:
            raise ValueError("packed tokens and a boolean mask, please")
        return hidden_states


class Picky(nn.Module):
    def forward(self, hidden_states: Tensor, camera: Tensor) -> Tensor:
        if camera.shape[-1] != 6:
            raise ValueError("camera has 6 numbers")
        return hidden_states


def test_tries_combinations() -> None:
    inputs = _find(Masked, {})
    assert set(inputs) == {"hidden_states", "encoder_attention_mask"}
    assert inputs["encoder_attention_mask"].dtype == torch.bool


def test_asks_for_what_it_has_no_rule_for() -> None:
    with pytest.raises(InputsNotFound, match=r"needs camera.*--input NAME=SHAPE:DTYPE"):
        _find(Picky, {})
    camera = torch.zeros(1, 6)
    assert _find(Picky, {}, camera=camera)["camera"] is camera
    with pytest.raises(InputsNotFound, match=r"ValueError: camera has 6 numbers.*hidden_states, camera"):
        _find(Picky, {}, camera=torch.zeros(1, 5))
    with pytest.raises(InputsNotFound, match=r"no input 'lens'.*hidden_states, camera"):
        _find(Picky, {}, lens=1)
