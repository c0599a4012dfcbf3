"""What every model is called with, by frames, height and width of its latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _count(frames: int, height: int, width: int) -> int:
    return frames * (height // 2) * (width // 2)


def listed(*size: int) -> Call:
    return ([torch.randn(4, *size)], torch.tensor([900.0]), [torch.randn(12, 32)], _count(*size)), {}


def batched(*size: int) -> Call:
    return (torch.randn(1, 4, *size), torch.tensor([900.0]), torch.randn(1, 12, 32)), {}


def worded(*size: int) -> Call:
    (video, timestep, text), _ = batched(*size)
    return (video, text, timestep), {}


def counted(*size: int) -> Call:
    args, _ = listed(*size)
    return (torch.stack(args[0]), *args[1:]), {}


def captioned(*size: int) -> Call:
    mask = torch.ones(1, 12, dtype=torch.int64)
    return (torch.randn(1, 4, *size), torch.tensor([900.0]), torch.randn(1, 1, 12, 32)), {
        "encoder_attention_mask": mask
    }


def streamed(*size: int) -> Call:
    count = _count(*size)
    text = {"text_states": torch.randn(1, 16, 32), "text_mask": torch.ones(1, 16, dtype=torch.int64)}
    rotary = {"freqs_cos": torch.randn(count, 32), "freqs_sin": torch.randn(count, 32)}
    rest = {"text_states_2": torch.randn(1, 24), "guidance": torch.tensor([6000.0]), "return_dict": False}
    return (torch.randn(1, 4, *size), torch.tensor([900.0])), {**text, **rotary, **rest}


def padded(*size: int) -> Call:
    """Of the text, 9 tokens of 16 are valid."""
    args, kwargs = streamed(*size)
    mask = (torch.arange(16) < 9).to(torch.int64)[None]
    return args, {**kwargs, "text_mask": mask}


def towers(*size: int) -> Call:
    mask = (torch.arange(16) < 9).to(torch.int64)[None]
    text = {"text_states": torch.randn(1, 16, 32), "text_states_2": None, "encoder_attention_mask": mask}
    glyphs = {
        "byt5_text_states": torch.randn(1, 8, 1472),
        "byt5_text_mask": (torch.arange(8) < 3).to(torch.int64)[None],
    }
    rest = {"vision_states": torch.randn(1, 5, 32), "extra_kwargs": glyphs}
    return (torch.randn(1, 4, *size), torch.tensor([900.0])), {**text, **rest}


def packed(batch: int) -> Callable[..., Call]:
    """Video, and text of 9 and of 6 valid tokens, packed."""

    def inputs(*size: int) -> Call:
        count = _count(*size)
        mask = torch.arange(16) < torch.tensor([9, 6])[:batch, None]
        valid = F.pad(mask, (count, 0), value=True)
        lengths = valid.sum(-1, dtype=torch.int32)
        indices = {
            "cu_seqlens_kv": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_seqlen_in_batch_kv": int(lengths.max()),
            "valid_token_indices_kv": torch.nonzero(valid.flatten(), as_tuple=False).flatten(),
        }
        video, text = torch.randn(batch, 4, *size), torch.randn(batch, 16, 32)
        return (video, torch.full((batch,), 0.9), [text], [mask]), {"packed_indices": indices}

    return inputs


def by_frames(*size: int) -> Call:
    """[B, F, C, H, W]."""
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "encoder_attention_mask": torch.ones(1, 12)}
    frames, height, width = size
    video = torch.randn(1, frames, 4, height, width)
    return (video,), {**text, "timestep": torch.tensor([900.0]), "return_dict": False}


def listed_with_table(*size: int) -> Call:
    args, kwargs = listed(*size)
    angles = torch.outer(torch.arange(64.0), 0.9 ** torch.arange(16.0)).double()
    freqs = torch.polar(torch.ones_like(angles), angles)
    return args, {**kwargs, "device": torch.device("cpu"), "freqs": freqs}


def patched(*size: int) -> Call:
    """Tokens of a video, and their places."""
    count = _count(*size)
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "encoder_attention_mask": torch.ones(1, 12)}
    places = torch.rand(1, 3, count) * 16
    return (torch.randn(1, count, 4), places), {**text, "timestep": torch.tensor([[0.9]]), "return_dict": False}


def numbered(*size: int) -> Call:
    count = _count(*size)
    ids = {"img_ids": torch.randint(0, 16, (1, count, 3)).float(), "txt_ids": torch.zeros(1, 12, 3)}
    rest = {"txt": torch.randn(1, 12, 32), "timesteps": torch.tensor([0.9]), "y_vec": torch.randn(1, 24)}
    return (), {"img": torch.randn(1, count, 16), **ids, **rest}
