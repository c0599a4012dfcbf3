"""A call that is made again to be compared leaves no trace in the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svg2_compile
from svg2_compile.hosts.kept_state import kept_state
from tests.support import IDENTITY, assert_close

HEADS, DIM = 2, 32


class Part(nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.calls = 0
        self.kept: list = []
        self.named: dict = {"a": 1}
        self.steps = {1, 2}

    def forward(self, x):
        self.calls += 1
        self.kept.append(x)
        self.named = {**self.named, "b": x}
        self.named.pop("a")
        self.steps ^= {2, 3}
        self.seen += 1
        self.cache = x * 2
        return x


def _state(part: Part) -> tuple:
    return part.calls, list(part.kept), dict(part.named), set(part.steps), part.seen.tolist(), hasattr(part, "cache")


def test_attributes_containers_and_buffers_are_put_back():
    model = nn.Sequential(Part(), nn.Linear(2, 2))
    part, weight = model[0], model[1].weight
    objects = part.kept, part.named, part.steps
    before = _state(part)
    with kept_state(model):
        model(torch.ones(1, 2))
        assert _state(part) != before
    assert _state(part) == before and model[1].weight is weight
    assert all(now is then for now, then in zip((part.kept, part.named, part.steps), objects, strict=True))


def test_an_error_puts_back_too():
    part = Part()
    with pytest.raises(TypeError), kept_state(part):
        part(None)
    assert _state(part) == (0, [], {"a": 1}, {1, 2}, [0.0] * 3, False)


@torch.compiler.disable
def _scaled(x, calls):
    return x * (1 + calls)


class Counting(nn.Module):
    """Video tokens [B, N, 32]; what a call gives depends on how many there were, and it writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.calls = 0

    def forward(self, video, timestep):
        self.calls += 1
        scaled = _scaled(video, self.calls) + timestep.sin()[:, None, None]
        heads = self.qkv(scaled).unflatten(2, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        result = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        video.add_(1.0)
        return result


def test_a_model_with_state_is_enabled_as_it_is():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, model = Counting().eval(), Counting().eval()
    model.load_state_dict(plain.state_dict())
    mine, theirs = torch.randn(1, 64, DIM, generator=torch.Generator().manual_seed(1)), None
    theirs = mine.clone()
    with svg2_compile.enable(model, **IDENTITY) as enabled, torch.no_grad():
        for step in range(3):
            timestep = torch.full((1,), 9.0 - step)
            assert_close(model(mine, timestep), plain(theirs, timestep))
            assert torch.equal(mine, theirs) and model.calls == step + 1
        assert {run.graph for run in enabled.report().runs} == {"sparse"}
