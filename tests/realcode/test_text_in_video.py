"""Blocks that get text and video in one row, with positions on all of it: what cannot be told apart there is said."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import svg2_compile
from svg2_compile.hosts.in_place import patches_of
from tests.realcode.models import DIM, HEADS, Modulation, fused, rotate, sinusoid
from tests.support import IDENTITY, assert_close

TEXT = 6


class JoinedBlock(nn.Module):
    """Self-attention over text and video, all of them rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = Modulation(2)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, time: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale = self.modulation(time)
        query, key, value = self.qkv(x * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.out(fused(rotate(query, rotary), rotate(key, rotary), value).flatten(2))


class JoinedModel(nn.Module):
    patch_size, in_channels = (1, 2, 2), 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(8, DIM)
        self.blocks = nn.ModuleList(JoinedBlock() for _ in range(2))
        self.head = nn.Linear(DIM, 16)

    def forward(self, video: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.text(text), self.embed(video).flatten(2).transpose(1, 2)], dim=1)
        time = sinusoid(timestep, 2 * DIM)
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1.0, DIM // HEADS // 2)
        rotary = tuple(f(angles).repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            x = block(x, time, rotary)
        return self.head(x[:, text.shape[1] :])


INPUTS = (torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, TEXT, 8))
WORDS = "cluster 54 tokens, but its video has 48 patches"


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("regional", [True, False])
def test_it_is_said_where_blocks_cannot_tell(regional: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = JoinedModel().eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "svg2_compile"):
        expected = model(*INPUTS)
        with svg2_compile.enable(model, regional=regional, **IDENTITY) as enabled:
            for _ in range(2):
                assert_close(model(*INPUTS), expected)
            report = enabled.report()
    assert sum(run.graph == "sparse" for run in report.runs) == 4
    assert warnings_of(caplog).count(WORDS) == regional
    assert any(WORDS in note for note in report.notes) == regional


def test_patches_are_those_of_the_models_own_layout() -> None:
    model = JoinedModel()
    assert patches_of(model, INPUTS) == 3 * 4 * 4
    assert patches_of(model, (torch.zeros(1, 3, 4, 8, 7), *INPUTS[1:])) == 3 * 4 * 4  # frames first, padded
    assert patches_of(model, (torch.zeros(1, 5, 6, 8, 8),)) is None  # other channels
    assert patches_of(nn.Linear(2, 2), INPUTS) is None
