"""Diffusers' small pipelines, their tokens split over the ranks of the default group."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.e2e.pipelines import SmallPipeline, build

# Diffusers has no plan for HunyuanVideo. Each rank gets a piece of the video and a piece of the text.
_HUNYUAN_PLAN = {
    "rope": {
        0: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
        1: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
    },
    "transformer_blocks.0": {
        "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
PLANS: dict[str, Any] = {"hunyuan": _HUNYUAN_PLAN}


def parallel_build(name: str, heads: int = 4) -> SmallPipeline:
    """The pipeline ``name`` with enough heads for 4 ranks, and whatever diffusers needs to run it on several at all."""
    small = build(name)
    config = dict(small.pipe.transformer.config)
    if config["num_attention_heads"] < heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config["num_attention_heads"] = heads
            small.pipe.transformer = type(small.pipe.transformer).from_config(config).eval()
    if name == "hunyuan":
        # Its mask says where padded text is in the order of one process.
        small.arguments["prompt_attention_mask"] = torch.ones_like(small.arguments["prompt_attention_mask"])
    if name == "ltx":
        # Diffusers repeats the mask of the text for all heads, of which a rank has a part only.
        small.pipe.transformer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return small


def tensor_parallel(small: SmallPipeline) -> SmallPipeline:
    """CogVideoX with the heads of every attention divided among the ranks, and all tokens on each of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in small.pipe.transformer.transformer_blocks:
        plan = {f"attn1.{name}": ColwiseParallel() for name in ("to_q", "to_k", "to_v")}
        parallelize_module(block, mesh, {**plan, "attn1.to_out.0": RowwiseParallel()})
        block.attn1.heads //= dist.get_world_size()
    return small


def _without_mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "encoder_attention_mask": None}


def split(small: SmallPipeline, name: str, **degrees: Any) -> SmallPipeline:
    """The same pipeline, its transformer split; by default as Ulysses over all ranks."""
    degrees = degrees or {"ulysses_degree": dist.get_world_size()}
    config = diffusers.ContextParallelConfig(**degrees)
    small.pipe.transformer.enable_parallelism(config=config, cp_plan=PLANS.get(name))
    return small
