"""Wan and the models that share its architecture, in small configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.zoo.sample import Sample

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _wan_inputs(channels: int = 4, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, channels, 2, 16, 16),
        "timestep": torch.tensor([5] * batch),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
        "return_dict": False,
    }


def wan_t2v() -> Sample:
    """Self-attention over 128 video tokens, cross-attention to 12 text tokens."""
    return diffusers.WanTransformer3DModel(**_WAN), _wan_inputs()


def wan_t2v_batch2() -> Sample:
    """Two videos in one call."""
    return diffusers.WanTransformer3DModel(**_WAN), _wan_inputs(batch=2)


def wan_i2v() -> Sample:
    """Image-to-video: more latent channels in than out, and image tokens before the 512 text tokens that Wan fixes."""
    module = diffusers.WanTransformer3DModel(
        **{**_WAN, "in_channels": 12, "image_dim": 4, "added_kv_proj_dim": 24, "pos_embed_seq_len": None}
    )
    text = torch.randn(1, 512, 16)
    image = torch.randn(1, 7, 4)
    return module, {**_wan_inputs(12), "encoder_hidden_states": text, "encoder_hidden_states_image": image}


def wan_ti2v() -> Sample:
    """One timestep for every token (Wan 2.2 5B image-to-video)."""
    inputs = _wan_inputs()
    inputs["timestep"] = torch.full((1, 128), 5)
    return diffusers.WanTransformer3DModel(**_WAN), inputs


def wan_vace() -> Sample:
    """A control video in blocks of its own."""
    module = diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1], vace_in_channels=8)
    return module, {**_wan_inputs(), "control_hidden_states": torch.randn(1, 8, 2, 16, 16)}


def skyreels_v2() -> Sample:
    """Wan's architecture with SkyReels' time embedding."""
    return diffusers.SkyReelsV2Transformer3DModel(**_WAN), _wan_inputs()


def chronoedit() -> Sample:
    """Wan's architecture with a temporal skip in its rotary embedding."""
    return diffusers.ChronoEditTransformer3DModel(**_WAN, rope_temporal_skip_len=2), _wan_inputs()
