"""Tokens that lie in another order are brought together, attended to, and put back: nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svg2_compile.passes.canonical import canonical_sites
from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.sites import Site
from tests.passes.attention_graphs import DIM, HEADS, decide, dynamo_graph, rewritten

Parts = list[Tensor]


class Mixed(nn.Module):
    """Self-attention over pieces of a video and a text in any order."""

    def __init__(self, join: Callable[[Tensor, Tensor], Parts], mask: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join, self.mask = join, mask
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, video: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        parts = self.join(video, text)
        query, key, value = self.qkv(torch.cat(parts, 1)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if self.mask != "none":
            mask = torch.cat([valid[:, : part.shape[1]] for part in parts], 1)[:, None, None, :]
            mask = mask & mask.transpose(2, 3) if self.mask == "outer" else mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return video + out[:, parts[0].shape[1] :][:, : video.shape[1]].mean(1, keepdim=True)


def inputs(video: int = 21, text: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 4:9] = False
    return torch.randn(2, video, DIM), torch.randn(2, text, DIM), valid


ORDERS: dict[str, Callable[[Tensor, Tensor], Parts]] = {
    "text between": lambda v, t: [v[:, :9], t, v[:, 9:]],
    "text around": lambda v, t: [t, v, t, v, t],
    "two videos": lambda v, t: [v, t, v.flip(1)],
}


@pytest.mark.parametrize("mask", ["none", "keys", "outer"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_video_in_pieces_is_clustered_as_one(order: str, dynamic: bool, mask: str) -> None:
    model = Mixed(ORDERS[order], mask).eval()
    gm, args = dynamo_graph(model, *inputs(), dynamic=dynamic)
    copied, (record,) = rewritten(gm)
    assert len(record.site.video_parts) == 2 and record.site.video_start == 0
    assert (record.site.key_padding is None) == (mask == "none")
    with torch.no_grad():
        torch.testing.assert_close(copied(*args)[0], gm(*args)[0], rtol=1e-5, atol=1e-6)


@given(pieces=st.lists(st.tuples(st.booleans(), st.integers(2, 7)), min_size=2, max_size=6))
@settings(max_examples=8, deadline=None)
def test_any_order_of_pieces(pieces: list[tuple[bool, int]]) -> None:
    if sum(is_video for is_video, _ in pieces) < 2:
        return
    torch._dynamo.reset()
    model = Mixed(lambda v, t: [(v if is_video else t)[:, :length] for is_video, length in pieces]).eval()
    gm, args = dynamo_graph(model, *inputs(text=7))
    copied, (record,) = rewritten(gm)
    assert record.site.video_tokens == sum(length for is_video, length in pieces if is_video)
    with torch.no_grad():
        torch.testing.assert_close(copied(*args)[0], gm(*args)[0], rtol=1e-5, atol=1e-6)


def test_what_sparsify_reads_is_left_alone() -> None:
    model = Mixed(lambda v, t: [t, v, t]).eval()
    gm, _ = dynamo_graph(model, *inputs())
    copied = copy_graph_module(gm)
    sites: list[Any] = decide(copied)
    before = str(copied.graph)
    assert isinstance(sites[0], Site) and canonical_sites(copied, sites) == sites and str(copied.graph) == before
