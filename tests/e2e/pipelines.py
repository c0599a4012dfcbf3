"""Diffusers' own pipelines around small transformers with random weights: prompt embeddings in, latents out.

pipeline = build("wan")
latents = pipeline.run(steps=4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from tests.support import IDENTITY

# Of "wan" below, and how many steps its videos have; dense_layers as published: one of the three layers.
LAYERS, BRANCHES, STEPS = 3, 2, 4
EXACT: dict[str, Any] = {**IDENTITY, "dense_layers": 0.03, "dense_steps": 1}


@dataclass
class SmallPipeline:
    """A pipeline with the arguments of one call."""

    pipe: Any
    arguments: dict[str, Any]
    guidance_branches: int

    def run(self, steps: int = 4, seed: int = 0, **changes: Any) -> torch.Tensor:
        """The latents of one video."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {**self.arguments, "num_inference_steps": steps, "generator": generator, **changes}
        return self.pipe(output_type="latent", **arguments).frames


def build(name: str) -> SmallPipeline:
    """The pipeline ``name``, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = PIPELINES[name]()
    for component in small.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    small.pipe.set_progress_bar_config(disable=True)
    return small


def _wan() -> SmallPipeline:
    transformer = diffusers.WanTransformer3DModel(
        **{"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4},
        **{"out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32},
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    embeddings = {"prompt_embeds": torch.randn(1, 12, 16), "negative_prompt_embeds": torch.randn(1, 12, 16)}
    return SmallPipeline(pipe, {"height": 128, "width": 128, "num_frames": 5, "guidance_scale": 5.0, **embeddings}, 2)


def _wan_two_experts() -> SmallPipeline:
    small = _wan()
    second = diffusers.WanTransformer3DModel.from_config(small.pipe.transformer.config)
    small.pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=small.pipe.scheduler,
        transformer=small.pipe.transformer,
        transformer_2=second,
        boundary_ratio=0.8,
    )
    return small


def _hunyuan() -> SmallPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1},
        **{"num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16},
        **{"guidance_embeds": True, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    embeddings = {
        "prompt_embeds": torch.randn(1, 12, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": mask,
    }
    return SmallPipeline(pipe, {"height": 64, "width": 64, "num_frames": 5, **embeddings}, 1)


def _ltx() -> SmallPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8},
        **{"cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
    )
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 10:] = False
    embeddings = {
        "prompt_embeds": torch.randn(1, 16, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 16, 16),
        "negative_prompt_attention_mask": torch.ones_like(mask),
    }
    # Both branches in one batch.
    return SmallPipeline(pipe, {"height": 256, "width": 256, "num_frames": 9, "guidance_scale": 3.0, **embeddings}, 1)


def _cogvideox() -> SmallPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
        },
        **{"text_embed_dim": 8, "num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 5},
        **{"patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8},
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    embeddings = {"prompt_embeds": torch.randn(1, 8, 8), "negative_prompt_embeds": torch.randn(1, 8, 8)}
    return SmallPipeline(pipe, {"height": 128, "width": 128, "num_frames": 5, "guidance_scale": 6.0, **embeddings}, 1)


PIPELINES: dict[str, Callable[[], SmallPipeline]] = {
    "wan": _wan,
    "wan_two_experts": _wan_two_experts,
    "hunyuan": _hunyuan,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
}
