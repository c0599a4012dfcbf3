"""Tokens that a mask leaves are packed before attention, and put back behind it, as flash-attn's unpad_input does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.attention import stand_ins  # noqa: F401  (defines flash-attn's operators)
from tests.realcode.models import (
    CHANNELS,
    DIM,
    HEADS,
    TEXT_DIM,
    Inputs,
    Modulation,
    Rotary,
    Sample,
    patches,
    rotate,
    sinusoid,
    streams_inputs,
)


def varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Any) -> Tensor:
    rest = (starts, starts, longest, longest, 0.0, (DIM // HEADS) ** -0.5, False)
    return torch.ops.flash_attn._flash_attn_varlen_forward(query, key, value, *rest)[0]


class UnpaddedBlock(nn.Module):
    """Packs queries, keys and values as one tensor, by a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)
        self.video_out, self.text_out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.modulation = Modulation(3)

    def forward(
        self, video: Tensor, text: Tensor, time: Tensor, rotary: Rotary, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(time)
        first = self.video(video * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).unbind(2)
        second = self.text(text).unflatten(-1, (3, HEADS, -1)).unbind(2)
        query, key = (rotate(x, rotary) for x in first[:2])
        joint = [torch.cat(pair, 1) for pair in zip((query, key, first[2]), second, strict=True)]
        mask = F.pad(text_mask, (video.shape[1], 0), value=True)
        out = unpadded_attention(torch.stack(joint, 2), mask)
        a, b = out[:, : video.shape[1]], out[:, video.shape[1] :]
        return video + self.video_out(a) * gate, text + self.text_out(b)


def unpadded_attention(qkv: Tensor, mask: Tensor) -> Tensor:
    """[B, N, 3, H, D] -> [B, N, H * D], zeros where nothing is attended."""
    batch, length = mask.shape
    lengths = mask.sum(-1, dtype=torch.int32)
    places = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    starts = F.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    flat = qkv.flatten(2).flatten(0, 1)
    packed = torch.gather(flat, 0, places[:, None].expand(-1, flat.shape[1]))
    query, key, value = packed.unflatten(-1, (3, HEADS, -1)).unbind(1)
    out = varlen(query, key, value, starts, longest).flatten(1)
    back = torch.zeros(batch * length, out.shape[1], device=out.device, dtype=out.dtype)
    back[places] = out
    return back.unflatten(0, (batch, length))


class UnpaddedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(TEXT_DIM, DIM), nn.Linear(DIM, 3 * DIM)
        self.blocks = nn.ModuleList(UnpaddedBlock() for _ in range(2))
        self.head = nn.Linear(DIM, CHANNELS * 4)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        video, text, time = patches(x, self.patch), self.text(text), self.time(sinusoid(t, DIM))
        for block in self.blocks:
            video, text = block(video, text, time, (cos, sin), text_mask)
        return self.head(video), text


def unpadded_inputs(frames: int, height: int, width: int, valid: tuple[int, ...] = (4, 6)) -> Inputs:
    (video, timestep, text), rotary = streams_inputs(frames, height, width)
    batch = len(valid)
    mask = torch.arange(text.shape[1]) < torch.tensor(valid)[:, None]
    return (torch.randn(batch, *video.shape[1:]), timestep, torch.randn(batch, *text.shape[1:]), mask), rotary


class PlacesBlock(nn.Module):
    """Is handed the places, and packs queries, keys and values one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.modulation = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), Modulation(3)

    def forward(
        self, x: Tensor, time: Tensor, rotary: Rotary, text_tokens: int, places: Tensor, starts: Tensor, longest: int
    ) -> Tensor:
        shift, scale, gate = self.modulation(time)
        query, key, value = self.qkv(x * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).unbind(2)
        query, key = (torch.cat([rotate(t[:, :-text_tokens], rotary), t[:, -text_tokens:]], 1) for t in (query, key))
        tokens = (t.reshape(-1, HEADS, DIM // HEADS) for t in (query, key, value))
        query, key, value = (t.index_select(0, places) for t in tokens)
        out = varlen(query, key, value, starts, longest).flatten(1)
        rows = x.new_zeros(x.shape[0] * x.shape[1], DIM)
        out = torch.scatter(rows, 0, places.unsqueeze(1).expand(-1, DIM), out)
        return x + self.out(out.view(x.shape)) * gate


class PlacesModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(TEXT_DIM, DIM)
        self.time, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, CHANNELS * 4)
        self.blocks = nn.ModuleList(PlacesBlock() for _ in range(2))

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, places: Tensor, starts: Tensor, longest: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        video, text, time = patches(x, self.patch), self.text(text), self.time(sinusoid(t, DIM))
        joint = torch.cat([video, text], 1)
        for block in self.blocks:
            joint = block(joint, time, (cos, sin), text.shape[1], places, starts, longest)
        return self.head(joint)


def places_inputs(frames: int, height: int, width: int, valid: tuple[int, ...] = (4, 6)) -> Inputs:
    (video, timestep, text, mask), rotary = unpadded_inputs(frames, height, width, valid)
    mask = F.pad(mask, (frames * (height // 2) * (width // 2), 0), value=True)
    lengths = mask.sum(1, dtype=torch.int32)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return (video, timestep, text, mask.flatten().nonzero().flatten(), starts, int(lengths.max())), rotary


UNPADDED: dict[str, Sample] = {
    "unpadded by a mask": Sample(UnpaddedModel, unpadded_inputs, 2, exports=False),
    "unpadded by places": Sample(PlacesModel, places_inputs, 2, exports=False),
}
