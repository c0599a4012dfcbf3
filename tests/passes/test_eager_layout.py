"""Where the video is, told by a model's own code on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svg2_compile.passes.eager_layout import EagerLayout, lay_out
from svg2_compile.passes.stays_dense import StaysDense

VIDEO, TEXT, HEADS, WIDTH = 48, 7, 2, 8


class Joint(nn.Module):
    """Text before or after the video, or in a sequence of its own; attention reports itself."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.calls: list[Any] = []
        self.noting: EagerLayout | None = None

    def attend(self, place: str, tokens: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        query = self.qkv(tokens).unflatten(-1, (3, HEADS, WIDTH))[:, :, 0]
        _, key, value = self.qkv(tokens if others is None else others).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        if NOTING is not None:
            NOTING.note(place, query, key, value)
        self.calls.append(place)
        out = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        return tokens + out.transpose(1, 2).flatten(2)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        text = self.attend("text", encoder_hidden_states)
        if self.order == "apart":
            video = self.attend("video", hidden_states)
            return self.attend("cross", video, text)
        if self.order == "data" and hidden_states.sum() > 0:
            return hidden_states
        pieces = [text, hidden_states] if self.order == "first" else [hidden_states, text]
        joint = self.attend("joint", torch.cat(pieces, dim=1))
        return joint[:, TEXT:] if self.order == "first" else joint[:, :VIDEO]


NOTING: EagerLayout | None = None


@contextlib.contextmanager
def _noting(layout: EagerLayout) -> Iterator[None]:
    global NOTING
    NOTING = layout
    try:
        yield
    finally:
        NOTING = None


def _parts(order: str) -> Any:
    model = Joint(order)
    args = (torch.randn(2, VIDEO, HEADS * WIDTH), torch.randn(2, TEXT, HEADS * WIDTH))
    found = lay_out(model, args[:1], {"encoder_hidden_states": args[1]}, _noting)
    assert model.calls == []  # it is a copy that runs
    return found


def test_text_before_and_after_the_video():
    first, last = _parts("first"), _parts("last")
    assert first["joint"] == ((TEXT, VIDEO),) and last["joint"] == ((0, VIDEO),)
    assert first["text"].reason == "not_video"


def test_attention_to_text_and_of_text_alone():
    found = _parts("apart")
    assert found["video"] == ((0, VIDEO),)
    assert found["text"].reason == "not_video" and found["cross"].reason == "cross_attention"


def test_a_model_that_looks_at_data_cannot_be_followed():
    found = _parts("data")
    assert isinstance(found, StaysDense) and found.reason == "unknown_layout"
    assert "could not be followed" in found.detail and "DataDependent" in found.detail


def test_places_with_several_layouts_stay_dense():
    class Twice(Joint):
        def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            self.attend("same", torch.cat([encoder_hidden_states, hidden_states], dim=1))
            self.attend("same", torch.cat([hidden_states, encoder_hidden_states], dim=1))
            return hidden_states

    args = (torch.randn(2, VIDEO, HEADS * WIDTH), torch.randn(2, TEXT, HEADS * WIDTH))
    assert lay_out(Twice(""), args, {}, _noting)["same"].detail.startswith("its calls in one call")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_data_is_needed(dtype):
    """The inputs may be anywhere, of any dtype: only their shapes are used."""
    model = Joint("last").to(device="meta", dtype=dtype)
    args = (torch.empty(1, VIDEO, HEADS * WIDTH, device="meta", dtype=dtype),)
    text = torch.empty(1, TEXT, HEADS * WIDTH, device="meta", dtype=dtype)
    assert lay_out(model, args, {"encoder_hidden_states": text}, _noting)["joint"] == ((0, VIDEO),)
