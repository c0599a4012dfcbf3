"""Which inputs tell the denoising step, on graphs written by hand; real models are in the token-layout tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from svg2_compile.passes.time_inputs import modulation_inputs
from svg2_compile.passes.token_layout import analyse_token_layout
from tests.zoo.graphs import short


def time_inputs(module: nn.Module, **inputs: Any) -> list[tuple[str, str, bool]]:
    """Name, kind and per_token of the inputs found inside a compile with symbolic sizes."""
    found: list[tuple[str, str, bool]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        layouts = analyse_token_layout(gm)
        found.extend((short(t.name), t.kind, t.per_token) for t in modulation_inputs(layouts, gm))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=True, fullgraph=True)(**inputs)
    return found


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(2, (2, -1)).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class WholeModel(nn.Module):
    """Embeds a timestep; positions of the tokens are embedded as sines as well."""

    def forward(self, video: Tensor, timestep: Tensor, ids: Tensor, text_length: Tensor) -> Tensor:
        """One attention over a modulated video."""
        embedded = torch.cat([torch.sin(timestep[:, None] * 2), torch.cos(timestep[:, None])], -1)
        sizes = torch.arange(video.shape[1]).sin()[:, None]
        tokens = video * (1 + embedded.mean(-1))[:, None, None] + ids.sin()[:, None] + sizes
        return video + attend(tokens) * (text_length > 3)[:, None, None]


def test_a_timestep_reaches_a_sine_and_position_ids_do_not_count() -> None:
    inputs = {"video": torch.randn(2, 20, 8), "ids": torch.randn(20), "text_length": torch.tensor([3, 5])}
    assert time_inputs(WholeModel(), timestep=torch.tensor([5, 5]), **inputs) == [("timestep", "timestep", False)]


class TimestepPerToken(nn.Module):
    """One timestep for every token."""

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        """One attention over a modulated video."""
        return video + attend(video * timestep.sin()[..., None])


def test_a_timestep_per_token_is_taken_where_there_is_no_other() -> None:
    found = time_inputs(TimestepPerToken(), video=torch.randn(2, 20, 8), timestep=torch.rand(2, 20))
    assert found == [("timestep", "timestep", True)]


class Block(nn.Module):
    """A transformer block that is given what others made of the timestep."""

    def forward(self, video: Tensor, temb: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        """One attention over a modulated, rotated video."""
        shift, scale = temb.chunk(2, 1)
        return video + attend((video * (1 + scale) + shift) * rope[..., None]) * mask[:, None, None]


def test_a_block_is_known_by_its_modulation() -> None:
    inputs = {"video": torch.randn(2, 20, 8), "rope": torch.randn(2, 20), "mask": torch.tensor([1, 1])}
    assert time_inputs(Block(), temb=torch.randn(2, 2, 8), **inputs) == [("temb", "modulation", False)]


class NoAttention(nn.Module):
    """Nothing that a step would change."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """A product."""
        return x * y


def test_without_attention_nothing_is_claimed() -> None:
    assert time_inputs(NoAttention(), x=torch.randn(3, 4), y=torch.randn(3, 4)) == []
