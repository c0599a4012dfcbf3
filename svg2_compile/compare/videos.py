"""What generators return, as one kind of video: a float32 tensor [C, F, H, W] on the CPU with values in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_video", "same_range"]


def as_video(output: Any, output_type: str | None = None, latent_channels: int | None = None) -> Tensor:
    """The first video of what a pipeline or a function returned.

    Args:
        output: an object with ``frames`` or ``images``, a tuple that begins with these, or the videos themselves:
            NumPy arrays [B, F, H, W, C] or pictures of PIL in [0, 1] and 0..255, or tensors.
        output_type: as of diffusers: "np", "pil", "pt" (tensors [B, F, C, H, W] in [0, 1]) or "latent" (tensors
            [B, C, F, H, W], or [B, F, C, H, W] where ``latent_channels`` says so; any range). None for tensors
            [C, F, H, W] or [B, C, F, H, W] in [-1, 1].
        latent_channels: C of latents.

    Returns:
        [C, F, H, W]; latents keep their range.

    Raises:
        TypeError, ValueError: if this is no video.
    """
    for name in ("frames", "images"):
        output = getattr(output, name, output)
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, Tensor):
        return _from_tensor(output.detach().float().cpu(), output_type, latent_channels)
    if isinstance(output, np.ndarray):
        return _from_array(output)
    if isinstance(output, Sequence) and len(output):
        return _from_pictures(output)
    raise TypeError(
        f"output: expected a video (frames or images as tensor, NumPy array or PIL pictures), got "
        f"{type(output).__name__}"
    )


def _from_tensor(tensor: Tensor, output_type: str | None, latent_channels: int | None) -> Tensor:
    if tensor.ndim == 4 and output_type == "pt":
        tensor = tensor[:, None]  # pictures [B, C, H, W]
    elif tensor.ndim == 4 and output_type == "latent":
        tensor = tensor[:, :, None]
    elif tensor.ndim == 4:
        tensor = tensor[None]
    if tensor.ndim != 5:
        raise ValueError(
            f"output: expected videos with 5 axes, got a tensor {tuple(tensor.shape)}. Latents that are packed into "
            "tokens are no video: with an autoencoder, output_type='np' gives frames."
        )
    frames_first = output_type == "latent" and latent_channels == tensor.shape[2] != tensor.shape[1]
    if output_type == "pt" or frames_first:
        tensor = tensor.transpose(1, 2)
    video = tensor[0].contiguous()
    return video * 2 - 1 if output_type == "pt" else video


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 4:
        array = array[:, None]  # pictures [B, H, W, C]
    if array.ndim != 5:
        raise ValueError(f"output: expected videos [B, F, H, W, C], got an array {array.shape}")
    scale = 255 if array.dtype == np.uint8 else 1
    return torch.from_numpy(array[0].astype(np.float32) / scale * 2 - 1).permute(3, 0, 1, 2).contiguous()


def _from_pictures(pictures: Sequence[Any]) -> Tensor:
    first = pictures[0]
    frames = first if isinstance(first, Sequence) else [first]
    arrays = [np.asarray(frame.convert("RGB")) if hasattr(frame, "convert") else np.asarray(frame) for frame in frames]
    return _from_array(np.stack(arrays)[None])


def same_range(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Two latent videos moved by one map, the one that takes ``reference`` to [-1, 1]."""
    low, high = reference.min(), reference.max()
    span = (high - low).clamp(min=1e-12)
    return (video - low) / span * 2 - 1, (reference - low) / span * 2 - 1
