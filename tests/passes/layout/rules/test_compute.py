"""Rules of the operators that compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.layout.named_axes import IMAGE, JOINT, VIDEO, analyse, layouts, written

COMPUTATIONS = {
    "pointwise": (lambda x: torch.sigmoid(x) * 2, JOINT, JOINT),
    "cast": (lambda x: x.to(torch.bfloat16).float(), JOINT, JOINT),
    "softmax": (lambda x: x.softmax(-1), JOINT, JOINT),
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), JOINT, JOINT),
    "rms_norm": (lambda x: F.rms_norm(x, (6,)), JOINT, JOINT),
    "group_norm": (lambda x: F.group_norm(x, 2), IMAGE, IMAGE),
    "dropout": (lambda x: F.dropout(x, 0.5, True), JOINT, JOINT),
    "cumsum": (lambda x: x.cumsum(1), JOINT, JOINT),
    "mean": (lambda x: x.mean(1), JOINT, ("b:2", "c:6")),
    "mean_keepdim": (lambda x: x.mean(-1, keepdim=True), JOINT, ("b:2", "video:8|text:4", "1")),
    "sum_of_all": (lambda x: x.sum(), JOINT, ()),
    "argmax": (lambda x: x.argmax(-1), JOINT, ("b:2", "video:8|text:4")),
    "sort_mixes": (lambda x: x.sort(1)[0], JOINT, ("b:2", "~text+video:12", "c:6")),
    "topk": (lambda x: x.topk(3, 1)[0], VIDEO, ("b:2", "video:3", "c:6")),
    "linear": (lambda x: F.linear(x, torch.empty(5, 6), torch.empty(5)), JOINT, ("b:2", "video:8|text:4", "5")),
    "token_mixing": (lambda x: torch.empty(7, 12) @ x, JOINT, ("b:2", "7", "c:6")),
    "conv": (lambda x: F.conv2d(x, torch.empty(9, 4, 3, 3), padding=1), IMAGE, ("b:2", "9", "h:8", "w:6")),
    "patchify": (lambda x: F.conv2d(x, torch.empty(9, 4, 2, 2), stride=2), IMAGE, ("b:2", "9", "h:4", "w:3")),
    "conv_transpose": (
        lambda x: F.conv_transpose2d(x, torch.empty(4, 9, 2, 2), stride=2),
        IMAGE,
        ("b:2", "9", "h:16", "w:12"),
    ),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0), IMAGE, ("b:2", "c:4", "h:16", "w:12")),
    "pool": (lambda x: F.avg_pool2d(x, 2), IMAGE, ("b:2", "c:4", "h:4", "w:3")),
    "embedding": (
        lambda x: F.embedding(x[..., 0].long(), torch.empty(99, 5)),
        JOINT,
        ("b:2", "video:8|text:4", "5"),
    ),
    "zeros_like": (lambda x: torch.zeros_like(x), JOINT, ("2", "12", "6")),
    "outer_sum": (
        lambda x: torch.einsum("bnc,bmc->bnm", x, x),
        JOINT,
        ("b:2", "video:8|text:4", "video:8|text:4"),
    ),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros(6)), JOINT, JOINT),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), JOINT, JOINT),
    "tril": (lambda x: torch.tril(x), JOINT, JOINT),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE, ("b:2", "1", "h:8 x c:2", "w:6 x c:2")),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE, ("b:2", "c:4 x h:2 x w:2", "h:4", "w:3")),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_computations(name: str) -> None:
    function, spec, expected = COMPUTATIONS[name]
    assert layouts(function, spec) == expected


def test_pointwise_broadcasts_and_joins_sources() -> None:
    modulation = ("b:2", "1", "temb:6")
    assert layouts(torch.mul, JOINT, modulation) == ("b:2", "video:8|text:4", "c+temb:6")
    assert layouts(torch.add, JOINT, ("rope:12", "6")) == ("b:2", "rope+video:8|rope+text:4", "c:6")


@pytest.mark.parametrize("mask", [False, True])
def test_attention_takes_tokens_of_the_query_and_head_dim_of_the_value(mask: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = torch.zeros(12, 5) if mask else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    query, key, value = ("b:2", "3", "video:8|text:4", "6"), ("b:2", "3", "text:5", "6"), ("b:2", "3", "text:5", "v:7")
    assert layouts(attend, query, key, value) == ("b:2", "3", "video:8|text:4", "v:7")
    _, mode = analyse(attend, query, key, value)
    assert {(written(a.query), written(a.key)) for a in mode.attentions} == {("video:8|text:4", "text:5")}


def test_decomposed_attention() -> None:
    def attend(query: Tensor, key: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), key)

    assert layouts(attend, JOINT, ("b:2", "text:5", "d:6")) == ("b:2", "video:8|text:4", "d:6")
