"""Text whose length depends on data: its padding is a sequence of its own in the row, as flash-attn packs them."""

from __future__ import annotations

import torch
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


def starts_of_rows(text_mask: Tensor, count: int) -> Tensor:
    starts = torch.zeros(2 * text_mask.shape[0] + 1, dtype=torch.int32)
    length = count + text_mask.shape[1]
    for row, valid in enumerate(text_mask.sum(1)):
        starts[2 * row + 1] = row * length + count + valid
        starts[2 * row + 2] = (row + 1) * length
    return starts


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.modulation = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), Modulation(3)

    def forward(self, x: Tensor, time: Tensor, rotary: Rotary, text_tokens: int, starts: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        shift, scale, gate = self.modulation(time)
        query, key, value = self.qkv(x * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).unbind(2)
        query, key = (torch.cat([rotate(t[:, :-text_tokens], rotary), t[:, -text_tokens:]], 1) for t in (query, key))
        packed = (t.reshape(batch * length, HEADS, -1) for t in (query, key, value))
        rest = (starts, starts, length, length, 0.0, (DIM // HEADS) ** -0.5, False)
        out = torch.ops.flash_attn._flash_attn_varlen_forward(*packed, *rest)[0]
        return x + self.out(out.view(batch, length, -1)) * gate


class PackedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(TEXT_DIM, DIM)
        self.time, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, CHANNELS * 4)
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        video, text, time = patches(x, self.patch), self.text(text), self.time(sinusoid(t, DIM))
        count = video.shape[1]
        starts, joint = starts_of_rows(text_mask, count), torch.cat([video, text], 1)
        for block in self.blocks:
            joint = block(joint, time, (cos, sin), text.shape[1], starts)
        return self.head(joint)  # padding of the text included


def packed_inputs(frames: int, height: int, width: int) -> Inputs:
    (video, timestep, text), rotary = streams_inputs(frames, height, width)
    mask = (torch.arange(text.shape[1]) < 1 + frames).long()[None]
    return (video, timestep, text, mask), rotary


PACKED: dict[str, Sample] = {
    "padding as a sequence": Sample(PackedModel, packed_inputs, 2, exports=False),
}
