"""Further transformers, in small configurations: the rules must know none of them by name."""

from __future__ import annotations

import diffusers
import torch

from tests.zoo.sample import Sample, padding_mask


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
        "encoder_attention_mask": padding_mask(1, 12, 9, torch.bool),
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
