"""Attentions that are spelled out are read, or said to be unreadable; other softmaxes are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from svg2_compile.passes.attention.find import find_attention
from tests.passes.attention_graphs import (
    DIALECTS,
    HEAD_DIM,
    HEADS,
    assert_spelling_is_exact,
    dynamo_graph,
    model_of,
    reasons,
    video,
)


def softmax_matmul(query, key, value):
    return torch.softmax(query @ key.transpose(-2, -1) * HEAD_DIM**-0.5, dim=-1) @ value


def softmax_method_divided(query, key, value):
    scores = torch.matmul(query, key.transpose(-1, -2)) / HEAD_DIM**0.5
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)


def scaled_query(query, key, value):
    return F.softmax((query * 0.2) @ key.mT, dim=-1) @ value


def bmm_three_axes(query, key, value):
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.25).softmax(-1), v).unflatten(0, (-1, HEADS))


def baddbmm(query, key, value):
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, HEADS))


def inactive_dropout(query, key, value):
    weights = F.dropout(torch.softmax(query @ key.mT, -1), p=0.1, training=False)
    return weights @ value


def einsum_heads_first(query, key, value):
    weights = torch.einsum("bhid,bhjd->bhij", query * HEAD_DIM**-0.5, key).softmax(-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, value)


def einsum_tokens_first(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.3).softmax(-1)
    return torch.einsum("bhmn,bnhe->bmhe", weights, value).transpose(1, 2)


def einsum_turning(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
    return torch.einsum("bhqk,bkhd->bhqd", weights, value)


def einsum_three_axes(query, key, value):
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    weights = torch.einsum("gid,gjd->gij", query, key).softmax(-1)
    return torch.einsum("gij,gjd->gid", weights, value).unflatten(0, (-1, HEADS))


def zero_bias(query, key, value):
    scores = query @ key.transpose(-2, -1) * HEAD_DIM**-0.5
    scores += torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2])
    return torch.softmax(scores, dim=-1) @ value


def zero_mask(query, key, value):
    bias = torch.zeros(query.shape[2], key.shape[2], dtype=query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None, None])


DYNAMO_ONLY = [einsum_heads_first, einsum_tokens_first, einsum_turning, einsum_three_axes]


@pytest.mark.parametrize("attend", DYNAMO_ONLY)
def test_einsum(attend):
    assert_spelling_is_exact(attend, "dynamo")
    assert_spelling_is_exact(attend, "exported")


def _einsum_over_heads(query, key, value):
    weights = torch.einsum("bhid,bhjd->bhij", query, key).softmax(-1)
    return torch.einsum("bhij,bgjd->bgid", weights, value)


def _written_bias(query, key, value):
    bias = torch.zeros(query.shape[2], key.shape[2])
    bias[0, 3] = 2.0
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


@pytest.mark.parametrize(
    ("attend", "reason"), [(_einsum_over_heads, "unreadable"), (_written_bias, "query_dependent_mask")]
)
def test_nearly_plain_attention_stays_dense(attend, reason):
    gm, _ = dynamo_graph(model_of(attend), video())
    assert reasons(gm) == [reason]


SPELLINGS = [
    zero_bias,
    zero_mask,
    softmax_matmul,
    softmax_method_divided,
    scaled_query,
    bmm_three_axes,
    baddbmm,
    inactive_dropout,
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("attend", SPELLINGS)
def test_spellings(attend, dialect):
    assert_spelling_is_exact(attend, dialect)


def _weights_used(query, key, value):
    weights = torch.softmax(query @ key.mT, -1)
    return weights @ value + weights.mean()


def _active_dropout(query, key, value):
    return F.dropout(torch.softmax(query @ key.mT, -1), p=0.5, training=True) @ value


def _relative_positions(query, key, value):
    scores = query @ key.mT
    return torch.softmax(scores + scores.cumsum(-1), -1) @ value


def _over_queries(query, key, value):
    return torch.softmax(query @ key.mT, -2) @ value


def _squared(query, key, value):
    return torch.softmax((query @ key.mT) ** 2, -1) @ value


@pytest.mark.parametrize("attend", [_weights_used, _active_dropout, _relative_positions, _over_queries, _squared])
def test_what_is_not_understood_is_unreadable(attend):
    gm, _ = dynamo_graph(model_of(attend), video())
    calls, found = find_attention(gm)
    assert calls == []
    assert [one.reason for one in found] in (["unreadable"], [])
    if attend is not _squared:
        assert "scaled_dot_product_attention" in found[0].detail


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: torch.softmax(q, -1) * v,
        lambda q, k, v: q @ (torch.softmax(k, -2).mT @ v),
        lambda q, k, v: torch.softmax(q.sum(-1), -1).unsqueeze(-1) * v,
    ],
    ids=["gate", "linear attention", "pooling"],
)
def test_a_softmax_that_is_no_attention_is_not_listed(attend):
    gm, _ = dynamo_graph(model_of(attend), video())
    assert [call for call in find_attention(gm)[0] if reasons(gm) == ["sparse"]] == []
