"""The small model: its configuration, reading and writing its weights, and sampling from it.

It is diffusers' Wan transformer, as it is, on pixels: no autoencoder, a patch of 1 x 4 x 4 pixels is a token. Nine of
its input channels tell where in the video a pixel is: rotary embedding tells distances, not places. It
predicts the velocity ``noise - video`` of ``x_t = (1 - t) video + t noise``; its timestep is ``1000 t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from svg2_compile.minidit.prompts import TEXT_DIM, Prompt, encode_prompt

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel


@dataclass(frozen=True)
class VideoSize:
    """Pixels of a video; height and width are multiples of four."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens at the model's patch of 1 x 4 x 4 pixels."""
        return self.frames * (self.height // 4) * (self.width // 4)


CONFIG: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 12,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 8,
    "cross_attn_norm": True,
    "rope_max_seq_len": 256,
}
"""5.1 M parameters, 10.3 MB in 16 bits."""

WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""What the package ships: trained by ``bench.minidit``."""

TIMESTEPS = 1000
INITIAL_QK_GAIN = 1.3
"""Queries and keys have length sqrt(32) times their gain, so a perfect match scores 5.7 gain^2 above an average key:
at a gain of one, too little to find one key among thousands. Training raises the gain; it starts above one."""


def build_model() -> WanTransformer3DModel:
    """A new model with random float32 weights. It predicts zero, and its blocks start near the identity."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")) and ".attn1." in name:
            nn.init.constant_(parameter, INITIAL_QK_GAIN)
        elif name.endswith(("to_out.0.weight", "ffn.net.2.weight")):
            nn.init.normal_(parameter, std=0.02 / (2 * CONFIG["num_layers"]) ** 0.5)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def save_weights(state: dict[str, Tensor], path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write weights as safetensors of ``dtype``."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, str(path), metadata={"format": "pt"})


def load_model(
    path: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> WanTransformer3DModel:
    """The model with the weights of a safetensors file, ready for inference."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    model = WanTransformer3DModel(**CONFIG)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(str(path)).items()})
    model = model.to(device).eval().requires_grad_(False)
    return model if dtype == torch.float32 else model.to(dtype)


def timestep_shift(tokens: int) -> float:
    """How far noise levels are moved towards pure noise: the more pixels show one scene, the more noise hides it.

    The same shift serves training and sampling. 3 at 512 tokens, 5 at 4,096, 7.1 at 16,384: where objects are and how
    they move shows at noise levels around 0.9 in a video of 512 tokens, around 0.95 in one of 4,096.
    """
    return 3.0 * (tokens / 512) ** 0.25


def shifted(t: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards one; the map that diffusers' flow-matching schedulers apply."""
    return shift * t / (1 + (shift - 1) * t)


def make_scheduler(tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """An Euler scheduler of the training's noise levels for videos of ``tokens`` tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=timestep_shift(tokens))


def set_noise_levels(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> None:
    """Set ``steps`` evenly spaced noise levels, from pure noise on, which the scheduler shifts."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())


def with_coordinates(videos: Tensor) -> Tensor:
    """What the model takes: videos (B, 3, F, H, W) and, per axis, the place u in [-1, 1] with its sine and cosine.

    Returns:
        (B, 12, F, H, W) of the dtype and device of ``videos``.
    """
    planes = []
    for axis in (2, 3, 4):
        length = videos.shape[axis]
        place = (2 * torch.arange(length, device=videos.device) + 1) / length - 1
        for plane in (place, torch.sin(math.pi * place), torch.cos(math.pi * place)):
            shape = [length if other == axis else 1 for other in range(1, 5)]
            planes.append(plane.to(videos.dtype).view(1, *shape).expand(len(videos), 1, *videos.shape[2:]))
    return torch.cat([videos, *planes], dim=1)


def initial_noise(seed: int, size: VideoSize) -> Tensor:
    """(1, 3, frames, height, width) float32, the same on every machine and in every precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, size.frames, size.height, size.width, generator=generator)


@torch.no_grad()
def sample_videos(
    model: nn.Module,
    prompts: Sequence[Prompt | str],
    seeds: Sequence[int],
    size: VideoSize,
    steps: int = 30,
    guidance: float = 3.0,
    scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample one video per prompt and seed, with classifier-free guidance.

    ``model`` is the transformer or anything that is called like it (compiled, say). With a guidance of one, the empty
    condition is not evaluated.

    Args:
        scheduler: one that somebody else watches (``enable(model, scheduler=...)``); its timesteps are set here.
        after_step: called with the index of every step once it is done.

    Returns:
        (len(prompts), 3, frames, height, width) float32 in [-1, 1] on the CPU.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    videos = torch.cat([initial_noise(seed, size) for seed in seeds])
    asked = torch.stack([encode_prompt(prompt) for prompt in prompts]).to(device, dtype)
    empty = encode_prompt(None).expand_as(asked).to(device, dtype)
    scheduler = scheduler or make_scheduler(size.tokens)
    set_noise_levels(scheduler, steps)
    for step, timestep in enumerate(scheduler.timesteps):
        times = timestep.to(device).expand(len(videos))
        latents = with_coordinates(videos.to(device, dtype))
        velocity = model(latents, times, asked, return_dict=False)[0].float()
        if guidance != 1:
            unguided = model(latents, times, empty, return_dict=False)[0].float()
            velocity = unguided + guidance * (velocity - unguided)
        videos = scheduler.step(velocity.cpu(), timestep, videos, return_dict=False)[0]
        if after_step is not None:
            after_step(step)
    return videos.clamp(-1, 1)


def sample_video(
    model: nn.Module,
    prompt: Prompt | str,
    seed: int,
    frames: int = 16,
    height: int = 64,
    width: int = 64,
    steps: int = 30,
    guidance: float = 3.0,
) -> Tensor:
    """Sample one video: (3, frames, height, width) float32 in [-1, 1]. Height and width are multiples of four."""
    return sample_videos(model, [prompt], [seed], VideoSize(frames, height, width), steps, guidance)[0]
