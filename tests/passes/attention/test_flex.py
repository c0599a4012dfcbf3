"""FlexAttention: plain or with key padding it is read; what changes scores or differs from query to query is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.passes.attention_graphs import (
    SelfAttention,
    assert_unchanged,
    dynamo_graph,
    model_of,
    reasons,
    rewritten,
    video,
)

TOKENS = 128


def masked_by(condition: Any) -> SelfAttention:
    def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return condition(valid, b, h, q, k)

        mask = create_block_mask(keep, query.shape[0], None, TOKENS, TOKENS, device="cpu", _compile=False)
        return flex_attention(query, key, value, block_mask=mask)

    return model_of(attend)


def valid_keys() -> Tensor:
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, 100:] = False
    return valid


@pytest.mark.parametrize("scale", [None, 0.2])
def test_plain_flex_attention(scale: float | None) -> None:
    model = model_of(lambda q, k, v: flex_attention(q, k, v, scale=scale))
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS))
    with torch.no_grad():
        assert_unchanged(gm, inputs, gm(*inputs)[0])


@pytest.mark.parametrize(
    "condition",
    [
        lambda valid, b, h, q, k: valid[b, k],
        lambda valid, b, h, q, k: k < valid.sum(1)[b],
        lambda valid, b, h, q, k: (k < 90) & valid[b, k],
    ],
)
def test_key_padding(condition: Any) -> None:
    gm, inputs = dynamo_graph(masked_by(condition), video(tokens=TOKENS), valid_keys())
    _, (record,) = rewritten(gm)
    assert record.site.key_padding is not None
    with torch.no_grad():
        assert_unchanged(gm, inputs, gm(*inputs)[0])


@pytest.mark.parametrize(
    "condition",
    [lambda valid, b, h, q, k: q >= k, lambda valid, b, h, q, k: valid[b, k] & (q - k < 16)],
)
def test_masks_that_depend_on_the_query(condition: Any) -> None:
    gm, _ = dynamo_graph(masked_by(condition), video(tokens=TOKENS), valid_keys())
    assert reasons(gm) == ["query_dependent_mask"]


def test_scores_that_are_changed() -> None:
    model = model_of(lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j)))
    gm, _ = dynamo_graph(model, video(tokens=TOKENS))
    assert reasons(gm) == ["unreadable"]
