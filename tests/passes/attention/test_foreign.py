"""Attention of other libraries: read by name and schema, rewritten to the same numbers, left alone where it is more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from svg2_compile.passes.attention.find import find_attention
from svg2_compile.passes.sites import Site
from tests.passes.attention import stand_ins
from tests.passes.attention_graphs import (
    KEEP_ALL,
    assert_unchanged,
    decide,
    dynamo_graph,
    model_of,
    reasons,
    rewritten,
    video,
)

ops = torch.ops
SCALE = 0.3


def token_major(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def flash_2(q, k, v, scale=SCALE, causal=False, left=-1, right=-1, softcap=0.0, slopes=None, dropout=0.0):
    rest = (dropout, scale, causal, left, right, softcap, slopes, False)
    return ops.flash_attn._flash_attn_forward(*token_major(q, k, v), *rest)[0].transpose(1, 2)


def flash_3(q, k, v, **options):
    options = {"softmax_scale": SCALE, **options}
    return ops.flash_attn_3._flash_attn_forward(*token_major(q, k, v), **options)[0].transpose(1, 2)


def flash_3_of_diffusers(q, k, v):
    return ops._diffusers_flash_attn_3._flash_attn_forward.default(*token_major(q, k, v), SCALE)[0].transpose(1, 2)


def flash_2_function(q, k, v, **options):
    return stand_ins.flash_attn_func(*token_major(q, k, v), **options).transpose(1, 2)


def flash_2_autograd(q, k, v):
    return stand_ins.FlashAttnFunc.apply(*token_major(q, k, v), SCALE).transpose(1, 2)


def sage_heads_first(q, k, v, **options):
    return stand_ins.sageattn(q, k, v, tensor_layout="HND", sm_scale=SCALE, **options)


def sage_tokens_first(q, k, v):
    return stand_ins.sageattn(*token_major(q, k, v), "NHD").transpose(1, 2)


def xformers(q, k, v, **options):
    return stand_ins.memory_efficient_attention(*token_major(q, k, v), scale=SCALE, **options).transpose(1, 2)


def xformers_without_heads(q, k, v):
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    return stand_ins.memory_efficient_attention(*flat).unflatten(0, (q.shape[0], -1))


def xformers_flash(q, k, v):
    tensors = token_major(q, k, v)
    rest = (None, None, None, q.shape[2], k.shape[2], 0.0, SCALE, False, -1, -1, False, None)
    return ops.xformers_flash.flash_fwd(*tensors, *rest)[0].transpose(1, 2)


DENSE = [
    *(flash_2, flash_3, flash_3_of_diffusers, flash_2_function, flash_2_autograd, sage_heads_first, sage_tokens_first),
    *(xformers, xformers_without_heads, xformers_flash),
]


@pytest.mark.parametrize("attend", DENSE)
def test_dense_calls(attend: Any) -> None:
    model = model_of(attend)
    gm, inputs = dynamo_graph(model, video())
    with torch.no_grad():
        assert_unchanged(gm, inputs, model(video()))


@pytest.mark.parametrize("attend", DENSE)
def test_nothing_is_left_of_the_operator(attend: Any) -> None:
    copied, _ = rewritten(dynamo_graph(model_of(attend), video())[0])
    left = [
        str(node.target) for node in copied.graph.nodes if "flash" in str(node.target) or "sage" in str(node.target)
    ]
    assert left == []


def varlen(q, k, v, starts, target=None):
    batch, _, tokens, _ = q.shape
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
    out = ops.flash_attn._flash_attn_varlen_forward(*packed, starts, starts, tokens, tokens, 0.0, SCALE, False)[0]
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)


def equal_by_arange(q, k, v):  # as diffusers' flash_varlen
    return varlen(q, k, v, torch.arange(0, q.shape[0] + 1, dtype=torch.int32) * q.shape[2])


def equal_by_cumsum(q, k, v):  # as Wan's official code
    lengths = torch.tensor([q.shape[2]] * q.shape[0], dtype=torch.int32)
    return varlen(q, k, v, torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attend", [equal_by_arange, equal_by_cumsum])
def test_sequences_of_one_length(attend: Any, batch: int, dynamic: bool) -> None:
    model = model_of(attend)
    x = video(batch)
    torch._dynamo.maybe_mark_dynamic(x, 1) if dynamic else None
    gm, inputs = dynamo_graph(model, x)
    with torch.no_grad():
        assert_unchanged(gm, inputs, model(video(batch)))
    (site,) = decide(gm)
    assert isinstance(site, Site) and site.batch == batch and site.video_parts[0][0] == 0


class _Masked(torch.nn.Module):
    """One sequence, and padding behind it, as the starts of sequences say at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of(lambda q, k, v, starts: varlen(q, k, v, starts))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        return self.inner(x, starts)


@pytest.mark.parametrize("end", [21, 13])
def test_one_sequence_that_ends_somewhere(end: int) -> None:
    model, starts = _Masked().eval(), torch.tensor([0, end], dtype=torch.int32)
    gm, inputs = dynamo_graph(model, video(1), starts)
    copied, (site,) = rewritten(gm)
    assert site.site.key_padding is not None
    with torch.no_grad():
        (actual,) = copied(*inputs)
        expected = model(video(1), starts)
    torch.testing.assert_close(actual[:, :end], expected[:, :end], rtol=1e-5, atol=1e-6)


def starts_of_rows(ends: list[int], tokens: int = 21) -> Tensor:
    """Rows of a sequence, and one of padding behind it."""
    bounds = [place for row, end in enumerate(ends) for place in (row * tokens, row * tokens + end)]
    return torch.tensor([*bounds, len(ends) * tokens], dtype=torch.int32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ends", [[13], [21], [1], [0], [13, 19], [21, 4]])
def test_rows_of_a_sequence_and_its_padding(ends: list[int], dynamic: bool) -> None:
    model, starts = _Masked().eval(), starts_of_rows(ends)
    x = video(len(ends))
    torch._dynamo.maybe_mark_dynamic(x, 1) if dynamic else None
    gm, inputs = dynamo_graph(model, x, starts)
    copied, (record,) = rewritten(gm)
    assert record.site.key_padding is not None and record.site.batch == len(ends)
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], model(x, starts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("places", [[0, 5, 13, 19, 42], [3, 13, 21, 30, 42], [0, 13, 21, 30, 40], [0, 30, 21, 40, 42]])
def test_rows_that_lie_otherwise_get_what_the_operator_yields(places: list[int]) -> None:
    model, expected = _Masked().eval(), torch.tensor(places, dtype=torch.int32)
    gm, inputs = dynamo_graph(model, video(2), starts_of_rows([13, 19]))
    copied, (record,) = rewritten(gm, replace(KEEP_ALL, collect_stats=True))
    inputs = [expected if value.dtype == torch.int32 else value for value in inputs]
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], gm(*inputs)[0], rtol=0, atol=0, equal_nan=True)
        assert record.density is not None and _value_of(copied, record.density, inputs).eq(1).all()


def _value_of(gm: fx.GraphModule, node: fx.Node, inputs: list[Any]) -> Tensor:
    gm.graph.output_node().args = ((node,),)
    gm.recompile()
    return gm(*inputs)[0]


def test_queries_and_keys_packed_otherwise_get_what_the_operator_yields() -> None:
    def attend(q, k, v, starts):
        packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v)]
        rest = (starts, starts + torch.tensor([0, 1, 0]), 21, 21, 0.0, SCALE, False)
        out = ops.flash_attn._flash_attn_varlen_forward(*packed, *rest)[0]
        return out.unflatten(0, (1, 21)).transpose(1, 2)

    gm, inputs = dynamo_graph(model_of(attend), video(1), starts_of_rows([13]))
    copied, _ = rewritten(gm)
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], gm(*inputs)[0], rtol=0, atol=0)


def too_short(q, k, v):
    return varlen(q, k, v, torch.tensor([0, 21, 40], dtype=torch.int32))


def five_unequal(q, k, v):
    return varlen(q, k, v, torch.tensor([0, 10, 20, 30, 42], dtype=torch.int32))


def four(q, k, v):
    return varlen(q, k, v, torch.tensor([0, 10, 20, 42], dtype=torch.int32))


@pytest.mark.parametrize("attend", [too_short, five_unequal, four])
def test_several_sequences_of_different_lengths_stay_dense(attend: Any) -> None:
    gm, _ = dynamo_graph(model_of(attend), video(2))
    assert reasons(gm) == ["several_sequences"]


def unequal(q, k, v):
    return varlen(q, k, v, torch.tensor([0, 10, q.shape[0] * q.shape[2]], dtype=torch.int32))


def test_of_two_sequences_in_one_row_the_second_is_reported_as_dense() -> None:
    model = model_of(unequal)
    gm, inputs = dynamo_graph(model, video(2))
    assert_unchanged(gm, inputs, model(video(2)))
    copied, (record,) = rewritten(gm, replace(KEEP_ALL, top_p=0.3, collect_stats=True))
    assert record.density is not None
    density = _value_of(copied, record.density, inputs)
    assert (density >= 32**2 / (10**2 + 32**2)).all() and (density < 1).all()


MORE = [
    (lambda q, k, v: flash_2(q, k, v, causal=True), "causal"),
    (lambda q, k, v: flash_2(q, k, v, dropout=0.1), "dropout"),
    (lambda q, k, v: flash_2(q, k, v, left=16, right=0), "unreadable"),
    (lambda q, k, v: flash_2(q, k, v, softcap=30.0), "unreadable"),
    (lambda q, k, v: flash_2(q, k, v, slopes=torch.ones(2)), "unreadable"),
    (lambda q, k, v: flash_3(q, k, v, attention_chunk=8), "unreadable"),
    (lambda q, k, v: flash_3(q, k, v, q_descale=torch.ones(2, 2)), "unreadable"),
    (lambda q, k, v: flash_2_function(q, k, v, window_size=(4, 4)), "unreadable"),
    (lambda q, k, v: sage_heads_first(q, k, v, is_causal=True), "causal"),
    (lambda q, k, v: xformers(q, k, v, attn_bias=torch.randn(2, 2, 21, 21)), "query_dependent_mask"),
    (lambda q, k, v: xformers(q, k, v, p=0.2), "dropout"),
    (lambda q, k, v: sage_heads_first(q, k, v, something_new=3), "unreadable"),
]


@pytest.mark.parametrize(("attend", "reason"), MORE)
def test_more_than_attention_stays_dense(attend: Any, reason: str) -> None:
    gm, _ = dynamo_graph(model_of(attend), video())
    assert reasons(gm) == [reason]


def test_a_used_log_sum_exp() -> None:
    def attend(q, k, v):
        rest = (0.0, SCALE, False, -1, -1, 0.0, None, False)
        out, lse, _, _ = ops.flash_attn._flash_attn_forward(*token_major(q, k, v), *rest)
        return (out + lse[..., None]).transpose(1, 2)

    gm, _ = dynamo_graph(model_of(attend), video())
    calls, (found,) = find_attention(gm)
    assert calls == [] and found.reason == "aux_outputs"


def test_quantised_attention_is_named() -> None:
    ((sage,), _), ((flash,), _) = (
        find_attention(dynamo_graph(model_of(attend), video())[0]) for attend in (sage_heads_first, flash_2)
    )
    assert sage.quantised and not flash.quantised
    assert (sage.form, flash.form) == ("sageattn", "_flash_attn_forward")
