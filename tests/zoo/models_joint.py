"""Models whose text joins the attention of the video, in small configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.zoo.sample import Sample, padding_mask


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
        "encoder_attention_mask": padding_mask(1, 12, 9, torch.int64),
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
        "encoder_attention_mask": padding_mask(1, 12, 12, torch.int64),
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
        "encoder_attention_mask": padding_mask(1, 12, 9, torch.bool),
        "encoder_hidden_states_2": torch.randn(1, 5, 8),
        "encoder_attention_mask_2": padding_mask(1, 5, 4, torch.bool),
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
        "encoder_attention_mask": padding_mask(2, 16, 10, torch.float32),
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
        "encoder_attention_mask": padding_mask(2, 16, 10, torch.bool),
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
