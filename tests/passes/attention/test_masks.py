"""Key padding is read exactly; a mask that differs from query to query keeps the attention dense."""

from __future__ import annotations

import pytest
import torch

from tests.passes.attention.masked_models import TOKENS, Masked, assert_padding_exact, rows, valid
from tests.passes.attention_graphs import HEADS, dynamo_graph, model_of, reasons, rewritten, video

# Every entry: the mask that the user hands in, and how the model makes an attention mask of it.
EXACT = {
    "bool": (valid(), lambda m: m[:, None, None]),
    "bool per head": (valid(), lambda m: m[:, None, None].repeat(1, HEADS, 1, 1)),
    "bool expanded to queries": (valid(), lambda m: m[:, None, None].expand(-1, 1, TOKENS, -1)),
    "bool repeated to queries": (valid(), lambda m: m[:, None, None].repeat(1, 1, TOKENS, 1)),
    "bool of two axes": (valid(), lambda m: m[:1]),
    "from integers": (valid().long(), lambda m: m.bool()[:, None, None]),
    "outer product": (valid(), lambda m: m[:, None, :, None] & m[:, None, None]),
    "outer product of expanded masks": (valid(), lambda m: rows(m).transpose(2, 3).bool() & rows(m)),
    "outer product, cast": (valid(), lambda m: torch.logical_and(rows(m), rows(m).swapaxes(-1, -2)).bool()),
    "keys and other queries": (valid(), lambda m: m[:, None, None] & m.roll(3, 1)[:, None, :, None]),
}


@pytest.mark.parametrize("name", EXACT)
def test_padding_is_exact(name):
    mask, make = EXACT[name]
    assert_padding_exact(mask, make, same_for_all=name == "bool of two axes")


@pytest.mark.parametrize("where", ["masked_fill", "where"])
def test_masks_inside_a_spelled_out_attention(where):
    def attend(query, key, value, mask):
        scores = query @ key.mT * 0.3
        allowed = mask[:, None, None]
        filled = scores.masked_fill(~allowed, -1e9) if where == "masked_fill" else torch.where(allowed, scores, -1e9)
        return filled.softmax(-1) @ value

    model = model_of(attend)
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), valid())
    copied, sites = rewritten(gm)
    assert len(sites) == 1
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], model(video(tokens=TOKENS), valid()), rtol=1e-5, atol=1e-6)


NOT_PADDING = {
    "a row per query": (torch.rand(2, 1, TOKENS, TOKENS) > 0.5, lambda m: m, "query_dependent_mask"),
    "either": (valid(), lambda m: m[:, None, :, None] | m[:, None, None], "query_dependent_mask"),
    "padding and a triangle": (valid(), lambda m: m[:, None, None] & _causal(), "query_dependent_mask"),
    "a triangle and its transpose": (valid(), lambda m: _causal() & _causal().mT, "query_dependent_mask"),
    "two masks over queries": (
        valid(),
        lambda m: rows(m).transpose(2, 3) & m[:, None, :, None],
        "query_dependent_mask",
    ),
    "a repeated batch": (
        valid(),
        lambda m: m.repeat(2, TOKENS).view(2, 2, TOKENS, TOKENS)[:, :1],
        "query_dependent_mask",
    ),
    "triangle": (valid(), lambda m: torch.ones(TOKENS, TOKENS).tril().bool(), "query_dependent_mask"),
    "bias per query": (torch.randn(2, 1, TOKENS, TOKENS), lambda m: m, "query_dependent_mask"),
}


def _causal():
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


@pytest.mark.parametrize("name", NOT_PADDING)
def test_other_masks_stay_dense(name):
    mask, make, reason = NOT_PADDING[name]
    gm, _ = dynamo_graph(Masked(make).eval(), video(tokens=TOKENS), mask)
    assert reasons(gm) == [reason]


def test_a_repeated_axis_of_several_is_no_axis_of_one():
    """Two masks repeated to four videos: without the repetition they would not broadcast."""
    model = Masked(lambda m: m[:, None, None].repeat(2, 1, TOKENS, 1)).eval()
    gm, _ = dynamo_graph(model, torch.cat([video(tokens=TOKENS)] * 2), valid())
    assert reasons(gm) == ["query_dependent_mask"]


def test_queries_without_keys_are_no_zeros_where_the_softmax_is_spelled_out():
    """There they have the mean of all values, which only dense attention gives."""

    def attend(query, key, value, mask):
        allowed = mask[:, None, None] & mask[:, None, :, None]
        return (query @ key.mT).masked_fill(~allowed, -1e9).softmax(-1) @ value

    gm, _ = dynamo_graph(model_of(attend), video(tokens=TOKENS), valid())
    assert reasons(gm) == ["query_dependent_mask"]


def test_a_spelled_out_causal_mask_stays_dense():
    def attend(query, key, value):
        future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
        return (query @ key.mT).masked_fill(future, float("-inf")).softmax(-1) @ value

    gm, _ = dynamo_graph(model_of(attend), video())
    assert reasons(gm) == ["query_dependent_mask"]
