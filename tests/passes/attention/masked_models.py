"""A model that makes an attention mask of its input, and the check that padding is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.passes.attention_graphs import dynamo_graph, model_of, rewritten, sdpa, video

TOKENS = 21
MakeMask = Callable[[torch.Tensor], torch.Tensor]


def valid() -> torch.Tensor:
    """[2, N] bool: the first video has four tokens of padding, the second nine."""
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, 17:] = False
    valid[1, 12:] = False
    return valid


def rows(mask: torch.Tensor) -> torch.Tensor:
    """The mask over keys, repeated to every query."""
    return mask.view(2, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)


class Masked(torch.nn.Module):
    """Self-attention under the mask that ``make`` makes of the input."""

    def __init__(self, make: MakeMask) -> None:
        super().__init__()
        self.make = make
        self.model = model_of(sdpa)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(hidden_states, self.make(mask))


def assert_padding_exact(mask: torch.Tensor, make: MakeMask, same_for_all: bool = False) -> None:
    """The rewritten model computes what the dense one does, whatever the padding of ``valid()`` holds.

    same_for_all: the mask is the first video's alone.
    """
    model = Masked(make).eval()
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), mask)
    copied, sites = rewritten(gm)
    assert len(sites) == 1 and sites[0].site.key_padding is not None
    with torch.no_grad():
        expected = model(video(tokens=TOKENS), mask)
        (actual,) = copied(*inputs)
        # Whatever padding holds is never read as a key.
        poisoned = [_poison(value) for value in inputs]
        (again,) = copied(*poisoned)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    if not same_for_all:
        torch.testing.assert_close(again[0, :12], expected[0, :12], rtol=1e-5, atol=1e-6)


def _poison(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != (2, TOKENS, 16):
        return value
    value = value.clone()
    value[0, 17:] += 100.0
    value[1, 12:] += 100.0
    return value
