"""Diffusers' own transformers in configurations that run in milliseconds: random weights, one set of inputs each.

    module, inputs = build("wan_t2v")
    module(**inputs)

`ZOO` maps names to factories. Weights and inputs are the same in every process (seeded in `build`). The models of
`VIDEO_MODELS` are what the compiler is for; the others check that no rule knows a model by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Sample = tuple[nn.Module, dict[str, Any]]


def build(name: str, seed: int = 0) -> Sample:
    """The model `name` in eval mode and keyword arguments of its forward. The global random state stays as it is."""
    if name not in ZOO:
        raise ValueError(f"unknown model {name!r}; the zoo has {', '.join(ZOO)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, inputs = ZOO[name]()
    return module.eval(), inputs


def _padding_mask(batch: int, length: int, valid: int, dtype: torch.dtype) -> Tensor:
    mask = torch.ones(batch, length, dtype=dtype)
    mask[:, valid:] = 0
    return mask


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


def hunyuan_video() -> Sample:
    """Joint attention over 128 video and 12 text tokens, of which 3 are padding; dual and single blocks."""
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": _padding_mask(1, 12, 9, torch.int64),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }


def framepack() -> Sample:
    """HunyuanVideo with history latents before the current ones."""
    module = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 3, 12, 12),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": _padding_mask(1, 12, 12, torch.int64),
        "pooled_projections": torch.randn(1, 8),
        "image_embeds": torch.randn(1, 5, 8),
        "indices_latents": torch.arange(3),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": torch.randn(1, 4, 2, 12, 12),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": torch.randn(1, 4, 2, 12, 12),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": torch.randn(1, 4, 4, 12, 12),
        "indices_latents_history_4x": torch.arange(4),
        "return_dict": False,
    }


def hunyuan_video15() -> Sample:
    """Two text encoders and an image encoder; tokens reordered by their masks."""
    module = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=6,
        rope_axes_dim=(2, 4, 4),
        target_size=16,
        task_type="t2v",
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": _padding_mask(1, 12, 9, torch.bool),
        "encoder_hidden_states_2": torch.randn(1, 5, 8),
        "encoder_attention_mask_2": _padding_mask(1, 5, 4, torch.bool),
        "image_embeds": torch.zeros(1, 3, 6),
        "return_dict": False,
    }


_COG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
}


def _cog_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 8, 8),
        "return_dict": False,
    }


def cogvideox() -> Sample:
    """Joint attention over 8 text tokens, then 32 video tokens; two videos, flattened together on the way."""
    return diffusers.CogVideoXTransformer3DModel(**_COG), _cog_inputs()


def cogvideox_rope() -> Sample:
    """CogVideoX 5B: the rotary embedding of the video tokens is an input."""
    module = diffusers.CogVideoXTransformer3DModel(**_COG, use_rotary_positional_embeddings=True)
    return module, {**_cog_inputs(), "image_rotary_emb": (torch.randn(32, 16), torch.randn(32, 16))}


def ltx_video() -> Sample:
    """Packed latents [B, N, C]; a text padding mask in the cross-attention."""
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    return module, {
        "hidden_states": torch.randn(2, 2 * 8 * 8, 4),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 16, 16),
        "encoder_attention_mask": _padding_mask(2, 16, 10, torch.float32),
        "num_frames": 2,
        "height": 8,
        "width": 8,
        "return_dict": False,
    }


def ltx2() -> Sample:
    """Video and audio in one model: two latents, cross-attention between them."""
    module = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    return module, {
        "hidden_states": torch.randn(1, 2 * 8 * 8, 4),
        "audio_hidden_states": torch.randn(1, 9, 4),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "audio_encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": torch.ones(1, 6),
        "audio_encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 2,
        "height": 8,
        "width": 8,
        "audio_num_frames": 9,
        "return_dict": False,
    }


def mochi() -> Sample:
    """Joint attention; Dynamo breaks the graph at its attention."""
    module = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    return module, {
        "hidden_states": torch.randn(2, 4, 2, 16, 16),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 16, 16),
        "encoder_attention_mask": _padding_mask(2, 16, 10, torch.bool),
        "return_dict": False,
    }


def allegro() -> Sample:
    """Self-attention over 32 video tokens with a (full) attention mask."""
    module = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=32,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=8,
    )
    return module, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "attention_mask": torch.ones(2, 2, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 1, 16, 8),
        "encoder_attention_mask": torch.ones(2, 16),
        "return_dict": False,
    }


def easyanimate() -> Sample:
    """Joint attention, text first."""
    module = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        mmdit_layers=1,
        patch_size=2,
        sample_width=16,
        sample_height=16,
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 16, 16),
        "return_dict": False,
    }


def latte() -> Sample:
    """Spatial and temporal attention in turns: no attention over all video tokens."""
    module = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=100,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    return module, {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "return_dict": False,
    }


def cosmos() -> Sample:
    """Rotary and learned positional embeddings, adaptive norms of low rank."""
    module = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "attention_mask": torch.ones(1, 12),
        "fps": 30,
        "return_dict": False,
    }


def motif_video() -> Sample:
    """HunyuanVideo-like dual and single blocks."""
    module = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    return module, {
        "hidden_states": torch.randn(1, 9, 2, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": _padding_mask(1, 12, 9, torch.bool),
        "return_dict": False,
    }


def kandinsky5() -> Sample:
    """Visual tokens in a [T, H, W] layout that is flattened per block."""
    module = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
    )
    return module, {
        "hidden_states": torch.randn(1, 2, 16, 16, 4),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([5.0]),
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(12),
        "return_dict": False,
    }


def sana_video() -> Sample:
    """Linear self-attention: no softmax over the video tokens."""
    module = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        patch_size=(1, 2, 2),
        rope_max_seq_len=32,
    )
    return module, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([5]),
        "return_dict": False,
    }


def flux() -> Sample:
    """An image model: joint attention, text first, position ids as inputs."""
    module = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return module, {
        "hidden_states": torch.randn(1, 64, 4),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(64, 3),
        "txt_ids": torch.randn(12, 3),
        "return_dict": False,
    }


def qwen_image() -> Sample:
    """An image model: joint attention, text first, complex rotary embeddings."""
    module = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return module, {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_hidden_states_mask": torch.ones(1, 12, dtype=torch.int64),
        "timestep": torch.tensor([5.0]),
        "img_shapes": [(1, 8, 8)],
        "return_dict": False,
    }


VIDEO_MODELS: dict[str, Callable[[], Sample]] = {
    "wan_t2v": wan_t2v,
    "wan_i2v": wan_i2v,
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx_video": ltx_video,
    "mochi": mochi,
    "allegro": allegro,
    "easyanimate": easyanimate,
    "skyreels_v2": skyreels_v2,
}
OTHER_MODELS: dict[str, Callable[[], Sample]] = {
    "wan_t2v_batch2": wan_t2v_batch2,
    "wan_ti2v": wan_ti2v,
    "wan_vace": wan_vace,
    "chronoedit": chronoedit,
    "cogvideox_rope": cogvideox_rope,
    "framepack": framepack,
    "hunyuan_video15": hunyuan_video15,
    "ltx2": ltx2,
    "latte": latte,
    "cosmos": cosmos,
    "motif_video": motif_video,
    "kandinsky5": kandinsky5,
    "sana_video": sana_video,
    "flux": flux,
    "qwen_image": qwen_image,
}
ZOO: dict[str, Callable[[], Sample]] = {**VIDEO_MODELS, **OTHER_MODELS}
