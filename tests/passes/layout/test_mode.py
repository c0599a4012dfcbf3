"""Writes to views and sizes that depend on data, as the dispatch mode carries them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from svg2_compile.passes.layout.axes import constant
from svg2_compile.passes.layout.mode import LayoutMode
from tests.passes.layout.named_axes import JOINT, VIDEO, axis_of, layouts, written


def test_assignments_to_slices_write_their_segments() -> None:
    def assemble(video: Tensor, text: Tensor) -> Tensor:
        out = torch.empty(2, 12, 6)
        out[:, :8] = video
        out[:, 8:] = text
        return out

    assert layouts(assemble, VIDEO, ("b:2", "text:4", "c:6")) == JOINT


def test_interleaved_assignment_of_a_rotary_embedding() -> None:
    def rotate(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = -x[..., 1::2]
        out[..., 1::2] = x[..., 0::2]
        return out

    assert layouts(rotate, JOINT) == JOINT


def test_a_write_shows_in_earlier_views() -> None:
    def write(video: Tensor) -> Tensor:
        out = torch.zeros(2, 8, 6)
        view = out.transpose(1, 2)
        out.copy_(video)
        return view

    assert layouts(write, VIDEO) == ("b:2", "c:6", "video:8")


def test_writing_constants_keeps_positions() -> None:
    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 3:5] = 0
        return x.index_fill(1, torch.tensor([1]), 0.0)

    assert layouts(zero, JOINT) == JOINT


def test_data_dependent_sizes_carry_their_sources() -> None:
    mode = LayoutMode()
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), mode:
        mask = torch.empty(5, dtype=torch.bool)
        mode.set_axes(mask, (axis_of("mask:5"),))
        (index,) = torch.nonzero(mask, as_tuple=True)
        text = torch.empty(5, 3)
        mode.set_axes(text, (axis_of("text:5"), constant(3)))
        kept, chosen = text[index], torch.masked_select(text[:, 0], mask)
    assert written(mode.axes_of(kept)[0]).startswith("mask+text:u")
    assert written(mode.axes_of(chosen)[0]).startswith("mask+text:u")
