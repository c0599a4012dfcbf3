"""The rules, operator by operator, on fake tensors with named axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from svg2_compile.passes.layout.axes import MIXED, Axes, Axis, Segment, constant, make_axis
from svg2_compile.passes.layout.mode import LayoutMode
from svg2_compile.passes.layout.rules.table import RULES, rule_for

Spec = tuple[str, ...]


def axis_of(text: str) -> Axis:
    """`"video:8|text:4"`, `"2"`, `"batch:2x(video:8|text:4)"`: factors by x, segments by |."""
    factors = []
    for factor in text.split(" x "):
        segments = []
        for part in factor.split("|"):
            names, _, length = part.rpartition(":")
            segments.append(Segment(frozenset(n for n in names.split("+") if n), torch.sym_int(int(length))))
        factors.append(tuple(Segment(s.sources, constant_length(int(s.length))) for s in segments))
    return make_axis(factors)


def constant_length(length: int) -> Any:
    return constant(length).length


def written(axis: Axis) -> str:
    """The inverse of `axis_of`; `?` = unknown, `~` marks a mixed segment."""
    if axis.factors is None:
        return "?"
    factors = []
    for factor in axis.factors:
        parts = []
        for s in factor:
            names = "+".join(sorted(s.sources - {MIXED}))
            mark = "~" if MIXED in s.sources else ""
            parts.append(f"{mark}{names}:{s.length}" if names or mark else str(s.length))
        factors.append("|".join(parts) or "0")
    return " x ".join(factors) or "1"


def analyse(function: Callable[..., Any], *specs: Spec | Tensor) -> tuple[Any, LayoutMode]:
    """Runs `function` on fake tensors with the given axes. Returns its result and the mode."""
    mode = LayoutMode()
    with FakeTensorMode(), torch.no_grad(), mode:
        arguments = []
        for spec in specs:
            axes = tuple(axis_of(text) for text in spec)
            tensor = torch.empty([int(axis.length or 0) for axis in axes])
            mode.set_axes(tensor, axes)
            arguments.append(tensor)
        return function(*arguments), mode


def layouts(function: Callable[..., Any], *specs: Spec) -> Any:
    result, mode = analyse(function, *specs)
    assert not mode.unruled_ops
    if isinstance(result, (list, tuple)):
        return [spelled(mode.axes_of(tensor)) for tensor in result]
    return spelled(mode.axes_of(result))


def spelled(axes: Axes) -> Spec:
    return tuple(written(axis) for axis in axes)


JOINT = ("b:2", "video:8|text:4", "c:6")
VIDEO = ("b:2", "video:8", "c:6")
IMAGE = ("b:2", "c:4", "h:8", "w:6")

MOVES = {
    "transpose": (lambda x: x.transpose(1, 2), JOINT, ("b:2", "c:6", "video:8|text:4")),
    "permute": (lambda x: x.permute(2, 0, 1), JOINT, ("c:6", "b:2", "video:8|text:4")),
    "t": (lambda x: x[0].t(), JOINT, ("c:6", "video:8|text:4")),
    "movedim": (lambda x: x.movedim(1, -1), JOINT, ("b:2", "c:6", "video:8|text:4")),
    "flatten": (lambda x: x.flatten(0, 1), JOINT, ("b:2 x video:8|text:4", "c:6")),
    "unflatten": (lambda x: x.flatten(0, 1).unflatten(0, (2, 12)), JOINT, JOINT),
    "heads": (lambda x: x.view(2, 12, 2, 3).transpose(1, 2), JOINT, ("b:2", "c:2", "video:8|text:4", "c:3")),
    "reshape_mixes": (lambda x: x.reshape(2, 3, 4, 6), JOINT, ("b:2", "video:2|text:1", "~text+video:4", "c:6")),
    "unsqueeze": (lambda x: x.unsqueeze(-1), JOINT, (*JOINT, "1")),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(0), JOINT, JOINT),
    "squeeze_all": (lambda x: x[:, None].squeeze(), JOINT, JOINT),
    "expand": (lambda x: x[:, None].expand(2, 5, 12, 6), JOINT, ("b:2", "5", "video:8|text:4", "c:6")),
    "repeat": (lambda x: x.repeat(3, 1, 1), JOINT, ("3 x b:2", "video:8|text:4", "c:6")),
    "repeat_kv": (lambda x: x.repeat_interleave(2, dim=0), JOINT, ("b:2 x 2", "video:8|text:4", "c:6")),
    "select": (lambda x: x[:, 0], JOINT, ("b:2", "c:6")),
    "slice": (lambda x: x[:, 8:], JOINT, ("b:2", "text:4", "c:6")),
    "slice_from_end": (lambda x: x[:, :-4], JOINT, VIDEO),
    "slice_inside": (lambda x: x[:, 6:10], JOINT, ("b:2", "video:2|text:2", "c:6")),
    "slice_by_step": (lambda x: x[:, ::2], JOINT, ("b:2", "~text+video:6", "c:6")),
    "narrow": (lambda x: x.narrow(1, 0, 8), JOINT, VIDEO),
    "flip": (lambda x: x.flip(1), JOINT, ("b:2", "text:4|video:8", "c:6")),
    "roll": (lambda x: x.roll(1, 1), VIDEO, VIDEO),
    "roll_mixes": (lambda x: x.roll(1, 1), JOINT, ("b:2", "~text+video:12", "c:6")),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 3)), JOINT, ("b:2", "1|video:8|text:4|3", "c:6")),
    "pad_crops": (lambda x: F.pad(x, (0, 0, 0, -4)), JOINT, VIDEO),
    "pad_replicates": (lambda x: F.pad(x, (0, 0, 2, 0), mode="replicate"), VIDEO, ("b:2", "video:10", "c:6")),
    "unfold": (lambda x: x.unfold(1, 2, 2), VIDEO, ("b:2", "video:4", "c:6", "video:2")),
    "index_select": (lambda x: x.index_select(1, torch.arange(5)), VIDEO, ("b:2", "video:5", "c:6")),
    "index": (lambda x: x[:, torch.arange(3)], JOINT, ("b:2", "~text+video:3", "c:6")),
    "index_rows": (lambda x: x[torch.arange(2)[:, None], torch.arange(5)], VIDEO, ("b:2", "video:5", "c:6")),
    "gather": (lambda x: x.gather(1, torch.zeros(2, 3, 6, dtype=torch.long)), VIDEO, ("b:2", "video:3", "c:6")),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (3, 2)))).flatten(2), JOINT, None),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE, ("b:2", "1", "h:8 x c:2", "w:6 x c:2")),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE, ("b:2", "c:4 x h:2 x w:2", "h:4", "w:3")),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    function, spec, expected = MOVES[name]
    if expected is None:
        expected = ("b:2", "video:8|text:4", "c:3 x 2")
    assert layouts(function, spec) == expected


COMPUTES = {
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
}


@pytest.mark.parametrize("name", COMPUTES)
def test_computations(name: str) -> None:
    function, spec, expected = COMPUTES[name]
    assert layouts(function, spec) == expected


def test_pointwise_broadcasts_and_joins_sources() -> None:
    modulation = ("b:2", "1", "temb:6")
    assert layouts(torch.mul, JOINT, modulation) == ("b:2", "video:8|text:4", "c+temb:6")
    assert layouts(torch.add, JOINT, ("rope:12", "6")) == ("b:2", "rope+video:8|rope+text:4", "c:6")


def test_cat_and_split_keep_boundaries() -> None:
    text = ("b:2", "text:4", "c:6")
    assert layouts(lambda x, y: torch.cat([x, y], 1), VIDEO, text) == JOINT
    assert layouts(lambda x: x.split([8, 4], 1), JOINT) == [VIDEO, text]
    assert layouts(lambda x: x.chunk(3, 1), JOINT)[2] == text
    assert layouts(lambda x: x.unbind(0), JOINT) == [JOINT[1:], JOINT[1:]]
    assert layouts(lambda x: torch.stack([x, x], 1), JOINT) == ("b:2", "2", "video:8|text:4", "c:6")


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


def test_writes_at_unknown_places_mix() -> None:
    def scatter(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return x.index_put((torch.arange(2)[:, None], index.long()), source)

    result = layouts(scatter, VIDEO, ("i:3",), ("b:2", "text:3", "c:6"))
    assert result[1] == "~b+c+i+text+video:8"


def test_writing_constants_keeps_positions() -> None:
    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 3:5] = 0
        return x.index_fill(1, torch.tensor([1]), 0.0)

    assert layouts(zero, JOINT) == JOINT


def test_data_dependent_sizes_carry_their_sources() -> None:
    mode = LayoutMode()
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), mode:
        mask = torch.empty(5, dtype=torch.bool)
        mode.set_axes(mask, (axis_of("mask:5"),))
        (index,) = torch.nonzero(mask, as_tuple=True)
        text = torch.empty(5, 3)
        mode.set_axes(text, (axis_of("text:5"), constant(3)))
        kept, chosen = text[index], torch.masked_select(text[:, 0], mask)
    assert written(mode.axes_of(kept)[0]).startswith("mask+text:u")
    assert written(mode.axes_of(chosen)[0]).startswith("mask+text:u")


def test_an_operator_without_a_rule_is_unknown_and_counted() -> None:
    result, mode = analyse(lambda x: torch.linalg.qr(x)[0], VIDEO)
    assert dict(mode.unruled_ops) == {"aten.linalg_qr.default": 1}
    assert spelled(mode.axes_of(result)) == ("?", "?", "?")


def test_in_place_operators_share_the_rule_of_their_twin() -> None:
    assert rule_for(torch.ops.aten.masked_fill_.Scalar) is rule_for(torch.ops.aten.masked_fill.Scalar)
    assert rule_for(torch.ops.aten.index_put_.default) is rule_for(torch.ops.aten.index_put.default)
    assert rule_for(torch.ops.aten.linalg_qr.default) is None


def test_every_rule_names_an_operator_of_this_torch() -> None:
    missing = [packet for packet in RULES if not packet.overloads()]
    assert missing == []
