"""Symbolic layouts equal the concrete ones at the traced sizes; where they are unknown, numbers decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import svg2_compile
from svg2_compile.passes.graph.values import fake_mode_of
from svg2_compile.passes.layout.axes import MIXED, Axis, Segment, make_axis
from svg2_compile.passes.specialise import can_specialise
from svg2_compile.passes.token_layout import analyse_token_layout
from tests.passes.attention_graphs import dynamo_graph
from tests.support import assert_close

DIM = 16
SPARSE: dict[str, Any] = {"min_tokens": 0, "dense_steps": 0, "dense_layers": 0, "top_p": 1.0, "inner_backend": "eager"}


def attend(tokens: Tensor) -> Tensor:
    query, key, value = tokens.unflatten(-1, (2, -1)).transpose(1, 2).repeat(1, 3, 1, 1).chunk(3, dim=1)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Patched(nn.Module):
    """[B, 4, F, H, W] and [B, L, DIM]: patches and text attend to each other, cut apart in a way of one's own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.patch = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))

    def forward(self, video: Tensor, text: Tensor, length: int) -> Tensor:
        if self.way == "padded":
            video = F.pad(video, (0, -video.shape[-1] % 2, 0, (2 - video.shape[-2] % 2) % 2))
        frames, height, width = video.shape[2], video.shape[3], video.shape[4]
        tokens = self.patch(video).flatten(2).transpose(1, 2)
        count = frames * (height // 2) * (width // 2) if self.way == "counted" else tokens.shape[1]
        joint = attend(torch.cat([tokens, text], 1))
        if self.way == "int":
            return joint[:, :-length] + tokens
        if self.way == "viewed":
            rows = joint[:, :count].view(joint.shape[0], frames, -1, width // 2, DIM)
            return attend(rows.flatten(1, 3)) + tokens
        return joint[:, :count] + attend(torch.cat([joint[:, count:], joint[:, :count]], 1))[:, text.shape[1] :]


def inputs(frames: int, height: int, width: int, text: int = 6) -> tuple[Tensor, Tensor, int]:
    return torch.randn(1, 4, frames, height, width), torch.randn(1, text, DIM), text


def at_traced_sizes(axis: Axis, numbers: dict[Any, Any]) -> Axis:
    return (
        axis
        if axis.factors is None
        else make_axis(
            tuple(Segment(segment.sources, segment.length.xreplace(numbers)) for segment in factor)
            for factor in axis.factors
        )
    )


@pytest.mark.parametrize("sizes", [(3, 8, 12), (5, 6, 4), (2, 7, 9)])
@pytest.mark.parametrize("way", ["plain", "counted", "padded", "viewed"])
def test_a_symbolic_layout_is_the_concrete_layout_with_symbols(way: str, sizes: tuple[int, int, int]) -> None:
    gm, _ = dynamo_graph(Patched(way).eval(), *inputs(*sizes), dynamic=True)
    symbolic, concrete = analyse_token_layout(gm), analyse_token_layout(gm, concrete=True)
    shape_env = fake_mode_of(gm).shape_env
    assert shape_env is not None
    numbers = shape_env.backed_var_to_val
    assert symbolic.latent == concrete.latent
    checked = 0
    for node, axes in symbolic.axes.items():
        got = tuple(at_traced_sizes(axis, numbers) for axis in axes)
        assert got == concrete.axes[node], node.name
        checked += any(len(f) > 1 for axis in got for f in axis.factors or ())
    assert checked > 3
    assert not any(MIXED in axis.sources for axes in symbolic.axes.values() for axis in axes)


@pytest.mark.parametrize("way", ["plain", "counted", "padded", "viewed", "int"])
def test_what_is_sparse_at_one_size_is_sparse_at_the_next(way: str) -> None:
    torch._dynamo.reset()
    model = Patched(way).eval()
    compiled = torch.compile(model, backend="svg2", fullgraph=True, options=SPARSE)
    with torch.no_grad():
        for sizes in ((3, 8, 12), (5, 6, 4), (2, 10, 6, 7), (4, 6, 6, 9)):
            call = inputs(*sizes)
            assert_close(compiled(*call), model(*call))
    sites = svg2_compile.report(model).sites
    assert len(sites) >= 2 and {site.reason for site in sites} == {"sparse"}


def test_only_guarded_symbols_can_be_fixed() -> None:
    seen = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        seen.append(can_specialise(gm))
        return gm

    video, text, length = inputs(3, 8, 12)
    with torch.no_grad():
        for dynamic in (False, True):
            torch._dynamo.reset()
            torch.compile(Patched("plain").eval(), backend=backend, dynamic=dynamic)(video, text, length)
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(video, 3)
        torch.compile(Patched("plain").eval(), backend=backend)(video, text, length)
    assert seen == [False, True, False]
