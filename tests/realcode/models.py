"""Compact video transformers in the manner of the code that people run: written for these tests, with its structure.

What each keeps of its kind is what makes it hard to compile or to read: how the sizes of the grid get into the rotary
embedding, how attention is called, how text and video are joined, and where they are cut apart again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, TEXT_DIM, CHANNELS = 32, 2, 24, 4
Rotary = tuple[Tensor, Tensor]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """A kind of model. inputs: of a call, by frames, height and width. sparse: how many attentions see the video."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    sparse: int
    exports: bool = True


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    frequencies = torch.exp(-torch.arange(dim // 2) / (dim // 2) * 6.0)
    angles = timestep.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Modulation(nn.Module):
    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, pieces, DIM) * 0.1)
        self.pieces = pieces

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return (self.table + time.unflatten(-1, (self.pieces, DIM))).chunk(self.pieces, dim=1)


def patches(video: Tensor, layer: nn.Module) -> Tensor:
    return layer(video).flatten(2).transpose(1, 2)


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, H, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


# Videos as a list of tensors, padded to one length; the grid in a tensor, read in the rotary embedding; an attention
# function that warns where flash-attn is missing.


def rotate_by_grid(x: Tensor, grid: Tensor, table: Tensor) -> Tensor:
    parts = table.split([table.shape[1] - 2 * (table.shape[1] // 3), *[table.shape[1] // 3] * 2], dim=1)
    rows = []
    for index, (frames, height, width) in enumerate(grid.tolist()):
        count = frames * height * width
        angles = torch.cat(
            [
                parts[0][:frames].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                parts[1][:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                parts[2][:width].view(1, 1, width, -1).expand(frames, height, width, -1),
            ],
            dim=-1,
        ).reshape(count, 1, -1)
        pairs = torch.view_as_complex(x[index, :count].to(torch.float64).reshape(count, x.shape[2], -1, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)
        rows.append(torch.cat([turned.to(x.dtype), x[index, count:]]))
    return torch.stack(rows)


def attend_with_lengths(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
    if lengths is not None:
        warnings.warn("lengths are ignored without flash-attn", stacklevel=2)
    return fused(query, key, value)


class ListBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.text_query, self.text_key, self.text_value, self.text_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.modulation = Modulation(3)

    def forward(self, x: Tensor, time: Tensor, lengths: Tensor, grid: Tensor, table: Tensor, text: Tensor) -> Tensor:
        batch, count = x.shape[:2]
        shift, scale, gate = self.modulation(time)
        y = x * (1 + scale) + shift
        query, key, value = (layer(y).view(batch, count, HEADS, -1) for layer in (self.query, self.key, self.value))
        query, key = rotate_by_grid(query, grid, table), rotate_by_grid(key, grid, table)
        x = x + self.out(attend_with_lengths(query, key, value, lengths)) * gate
        query = self.text_query(x).view(batch, count, HEADS, -1)
        key, value = (layer(text).view(batch, -1, HEADS, DIM // HEADS) for layer in (self.text_key, self.text_value))
        return x + self.text_out(attend_with_lengths(query, key, value))


class ListModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(TEXT_DIM, DIM), nn.Linear(DIM, 3 * DIM)
        self.blocks = nn.ModuleList(ListBlock() for _ in range(2))
        self.head = nn.Linear(DIM, CHANNELS * 4)
        self.table = torch.outer(torch.arange(64.0), 0.9 ** torch.arange(DIM // HEADS // 2))

    def forward(self, videos: list[Tensor], timestep: Tensor, texts: list[Tensor], length: int) -> list[Tensor]:
        tokens = [self.patch(video[None]) for video in videos]
        grid = torch.stack([torch.tensor(video.shape[2:], dtype=torch.long) for video in tokens])
        tokens = [video.flatten(2).transpose(1, 2) for video in tokens]
        lengths = torch.tensor([video.shape[1] for video in tokens], dtype=torch.long)
        assert lengths.max() <= length
        x = torch.cat([torch.cat([t, t.new_zeros(1, length - t.shape[1], t.shape[2])], 1) for t in tokens])
        text = self.text(torch.stack([torch.cat([t, t.new_zeros(10 - t.shape[0], t.shape[1])]) for t in texts]))
        time = self.time(sinusoid(timestep, DIM))
        for block in self.blocks:
            x = block(x, time=time, lengths=lengths, grid=grid, table=self.table, text=text)
        x = self.head(x)
        videos = []
        for row, (frames, height, width) in zip(x, grid.tolist(), strict=True):
            video = row[: frames * height * width].view(frames, height, width, 1, 2, 2, CHANNELS)
            videos.append(torch.einsum("fhwpqrc->cfphqwr", video).reshape(CHANNELS, frames, height * 2, width * 2))
        return videos


def list_inputs(frames: int, height: int, width: int) -> Inputs:
    count = frames * (height // 2) * (width // 2)
    return (
        [torch.randn(CHANNELS, frames, height, width)],
        torch.tensor([900.0]),
        [torch.randn(8, TEXT_DIM)],
        count,
    ), {}


# Video and text in streams of their own, then as one; cut apart at a number that is computed from the latent's sizes.


class DoubleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)
        self.video_out, self.text_out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.modulation = Modulation(3)

    def forward(self, video: Tensor, text: Tensor, time: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(time)
        first = self.video(video * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).unbind(2)
        second = self.text(text).unflatten(-1, (3, HEADS, -1)).unbind(2)
        query, key = (rotate(x, rotary) for x in first[:2])
        pairs = zip((query, key, first[2]), second, strict=True)
        joint = fused(*(torch.cat(pair, 1) for pair in pairs))
        a, b = joint[:, : video.shape[1]], joint[:, video.shape[1] :]
        return video + self.video_out(a) * gate, text + self.text_out(b)


class SingleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(2 * DIM, DIM)
        self.modulation = Modulation(3)

    def forward(self, x: Tensor, time: Tensor, rotary: Rotary, text_tokens: int) -> Tensor:
        shift, scale, gate = self.modulation(time)
        qkv, mlp = self.inner(x * (1 + scale) + shift).split([3 * DIM, DIM], dim=-1)
        query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
        query, key = (torch.cat([rotate(t[:, :-text_tokens], rotary), t[:, -text_tokens:]], 1) for t in (query, key))
        return x + self.out(torch.cat([fused(query, key, value), F.gelu(mlp)], -1)) * gate


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (table[None, :, None].to(x.dtype) for table in rotary)
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x * cos + turned * sin).to(x.dtype)


class StreamsModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(TEXT_DIM, DIM), nn.Linear(DIM, 3 * DIM)
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(2))
        self.head = nn.Linear(DIM, CHANNELS * 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _, _, frames, height, width = x.shape
        height, width = height // 2, width // 2
        video, text, time = patches(x, self.patch), self.text(text), self.time(sinusoid(t, DIM))
        count = frames * height * width
        for block in self.double_blocks:
            video, text = block(video, text, time, (cos, sin))
        joint = torch.cat([video, text], 1)
        for block in self.single_blocks:
            joint = block(joint, time, (cos, sin), text.shape[1])
        out = self.head(joint[:, :count]).reshape(x.shape[0], frames, height, width, CHANNELS, 1, 2, 2)
        return torch.einsum("nthwcopq->nctohpwq", out).reshape(x.shape[0], CHANNELS, frames, height * 2, width * 2)


def streams_inputs(frames: int, height: int, width: int) -> Inputs:
    count = frames * (height // 2) * (width // 2)
    angles = torch.outer(torch.arange(float(count)), 0.9 ** torch.arange(DIM // HEADS // 2)).repeat_interleave(2, 1)
    video, text = torch.randn(1, CHANNELS, frames, height, width), torch.randn(1, 6, TEXT_DIM)
    return (video, torch.tensor([900.0]), text), {"cos": angles.cos(), "sin": angles.sin()}


# Padding to the patch size, an attention function that reshapes for itself, and a text length of its own.


def optimized_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    batch, _, width = query.shape
    query, key, value = (t.view(batch, -1, heads, width // heads).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).reshape(batch, -1, width)


class PaddingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.modulation = Modulation(3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(time)
        y = torch.addcmul(shift, x, 1 + scale)
        attended = optimized_attention(self.query(y), self.key(y), self.value(y), heads=HEADS)
        return torch.addcmul(x, self.out(attended), gate)


class PaddingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(TEXT_DIM, DIM)
        self.time, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, CHANNELS * 4)
        self.blocks = nn.ModuleList(PaddingBlock() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        x = F.pad(x, (0, (2 - width % 2) % 2, 0, (2 - height % 2) % 2, 0, 0), mode="constant")
        tokens, context = patches(x, self.patch), self.text(context)
        joint = torch.cat([context, tokens], 1)
        time = self.time(sinusoid(timestep, DIM))
        for block in self.blocks:
            joint = block(joint, time)
        out = self.head(joint[:, context.shape[1] :])
        rows, columns = x.shape[3] // 2, x.shape[4] // 2
        out = out.view(batch, frames, rows, columns, channels, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return out.reshape(batch, channels, frames, rows * 2, columns * 2)[..., :height, :width]


def padding_inputs(frames: int, height: int, width: int) -> Inputs:
    video = torch.randn(1, CHANNELS, frames, height, width)
    return (video, torch.tensor([900.0]), torch.randn(1, 5 + frames, TEXT_DIM)), {}


# A timestep for every frame, and frames that are given in front of those that are made.


class FramesBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.scale = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        y = (x.unflatten(1, (frames, -1)) * (1 + self.scale(time))[:, :, None]).flatten(1, 2)
        query, key, value = self.qkv(y).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.out(fused(query, key, value))


class FramesModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(DIM, DIM)
        self.blocks, self.head = nn.ModuleList(FramesBlock() for _ in range(2)), nn.Linear(DIM, CHANNELS * 4)

    def forward(self, x: Tensor, timesteps: Tensor, history: Tensor) -> Tensor:
        given = patches(history, self.patch)
        tokens = torch.cat([given, patches(x, self.patch)], 1)
        frames = history.shape[2] + x.shape[2]
        time = self.time(sinusoid(timesteps, DIM))
        for block in self.blocks:
            tokens = block(tokens, time, frames)
        return self.head(tokens[:, given.shape[1] :])


def frames_inputs(frames: int, height: int, width: int) -> Inputs:
    video, history = torch.randn(1, CHANNELS, frames, height, width), torch.randn(1, CHANNELS, 2, height, width)
    return (video, torch.full((1, frames + 2), 900.0), history), {}


MODELS: dict[str, Sample] = {
    "lists and a grid tensor": Sample(ListModel, list_inputs, 2, exports=False),
    "double and single streams": Sample(StreamsModel, streams_inputs, 4),
    "padding to patches": Sample(PaddingModel, padding_inputs, 2),
    "given frames": Sample(FramesModel, frames_inputs, 2),
}
