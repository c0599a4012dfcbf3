"""Additive masks that only exclude keys are padding; any other bias keeps the attention dense."""

from __future__ import annotations

import pytest
import torch

from tests.passes.attention.masked_models import TOKENS, Masked, assert_padding_exact, valid
from tests.passes.attention_graphs import HEADS, dynamo_graph, reasons, video

EXACT = {
    "minus ten thousand": (valid().long(), lambda m: ((1 - m.bool().to(torch.float32)) * -10000.0)[:, None, None]),
    "repeat_interleave to heads": (
        valid(),
        lambda m: ((1 - m.float()) * -10000.0)[:, None].repeat_interleave(HEADS, dim=0).view(-1, HEADS, 1, TOKENS),
    ),
    "masked_fill": (valid(), lambda m: torch.zeros(2, 1, 1, TOKENS).masked_fill(~m[:, None, None], float("-inf"))),
    "where": (valid(), lambda m: torch.where(m, 0.0, torch.finfo(torch.float32).min)[:, None, None]),
}


@pytest.mark.parametrize("name", EXACT)
def test_padding_is_exact(name):
    mask, make = EXACT[name]
    assert_padding_exact(mask, make)


NOT_PADDING = {
    "any bias": (torch.randn(2, 1, 1, TOKENS), lambda m: m, "additive_bias"),
    "soft padding": (torch.rand(2, TOKENS), lambda m: ((1 - m) * -10000.0)[:, None, None], "additive_bias"),
    "weak padding": (valid(), lambda m: ((1 - m.float()) * -5.0)[:, None, None], "additive_bias"),
}


@pytest.mark.parametrize("name", NOT_PADDING)
def test_other_masks_stay_dense(name):
    mask, make, reason = NOT_PADDING[name]
    gm, _ = dynamo_graph(Masked(make).eval(), video(tokens=TOKENS), mask)
    assert reasons(gm) == [reason]
