"""Key padding is read exactly; every other mask keeps the attention dense."""

from __future__ import annotations

import pytest
import torch

from tests.passes.attention_graphs import HEADS, dynamo_graph, model_of, reasons, rewritten, sdpa, video

TOKENS = 21


def _valid():
    """[2, N] bool: the first video has four tokens of padding, the second nine."""
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, 17:] = False
    valid[1, 12:] = False
    return valid


# Every entry: the mask that the user hands in, and how the model makes an attention mask of it.
EXACT = {
    "bool": (_valid(), lambda m: m[:, None, None]),
    "bool per head": (_valid(), lambda m: m[:, None, None].repeat(1, HEADS, 1, 1)),
    "bool expanded to queries": (_valid(), lambda m: m[:, None, None].expand(-1, 1, TOKENS, -1)),
    "bool repeated to queries": (_valid(), lambda m: m[:, None, None].repeat(1, 1, TOKENS, 1)),
    "bool of two axes": (_valid(), lambda m: m[:1]),
    "from integers": (_valid().long(), lambda m: m.bool()[:, None, None]),
    "minus ten thousand": (_valid().long(), lambda m: ((1 - m.bool().to(torch.float32)) * -10000.0)[:, None, None]),
    "repeat_interleave to heads": (
        _valid(),
        lambda m: ((1 - m.float()) * -10000.0)[:, None].repeat_interleave(HEADS, dim=0).view(-1, HEADS, 1, TOKENS),
    ),
    "masked_fill": (_valid(), lambda m: torch.zeros(2, 1, 1, TOKENS).masked_fill(~m[:, None, None], float("-inf"))),
    "where": (_valid(), lambda m: torch.where(m, 0.0, torch.finfo(torch.float32).min)[:, None, None]),
    "outer product": (_valid(), lambda m: m[:, None, :, None] & m[:, None, None]),
    "outer product of expanded masks": (_valid(), lambda m: _rows(m).transpose(2, 3).bool() & _rows(m)),
    "outer product, cast": (_valid(), lambda m: torch.logical_and(_rows(m), _rows(m).swapaxes(-1, -2)).bool()),
    "keys and other queries": (_valid(), lambda m: m[:, None, None] & m.roll(3, 1)[:, None, :, None]),
}


def _rows(mask):
    return mask.view(2, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)


class Masked(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.model = model_of(sdpa)

    def forward(self, hidden_states, mask):
        return self.model(hidden_states, self.make(mask))


@pytest.mark.parametrize("name", EXACT)
def test_padding_is_exact(name):
    mask, make = EXACT[name]
    model = Masked(make).eval()
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), mask)
    copied, sites = rewritten(gm)
    assert len(sites) == 1 and sites[0].site.key_padding is not None
    with torch.no_grad():
        expected = model(video(tokens=TOKENS), mask)
        (actual,) = copied(*inputs)
        # Whatever padding holds is never read as a key.
        poisoned = [_poison(value) for value in inputs]
        (again,) = copied(*poisoned)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    if name != "bool of two axes":
        torch.testing.assert_close(again[0, :12], expected[0, :12], rtol=1e-5, atol=1e-6)


def _poison(value):
    if not isinstance(value, torch.Tensor) or value.shape != (2, TOKENS, 16):
        return value
    value = value.clone()
    value[0, 17:] += 100.0
    value[1, 12:] += 100.0
    return value


@pytest.mark.parametrize("where", ["masked_fill", "where"])
def test_masks_inside_a_spelled_out_attention(where):
    def attend(query, key, value, mask):
        scores = query @ key.mT * 0.3
        allowed = mask[:, None, None]
        filled = scores.masked_fill(~allowed, -1e9) if where == "masked_fill" else torch.where(allowed, scores, -1e9)
        return filled.softmax(-1) @ value

    model = model_of(attend)
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), _valid())
    copied, sites = rewritten(gm)
    assert len(sites) == 1
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], model(video(tokens=TOKENS), _valid()), rtol=1e-5, atol=1e-6)


NOT_PADDING = {
    "a row per query": (torch.rand(2, 1, TOKENS, TOKENS) > 0.5, lambda m: m, "query_dependent_mask"),
    "either": (_valid(), lambda m: m[:, None, :, None] | m[:, None, None], "query_dependent_mask"),
    "padding and a triangle": (_valid(), lambda m: m[:, None, None] & _causal(), "query_dependent_mask"),
    "a triangle and its transpose": (_valid(), lambda m: _causal() & _causal().mT, "query_dependent_mask"),
    "two masks over queries": (
        _valid(),
        lambda m: _rows(m).transpose(2, 3) & m[:, None, :, None],
        "query_dependent_mask",
    ),
    "a repeated batch": (
        _valid(),
        lambda m: m.repeat(2, TOKENS).view(2, 2, TOKENS, TOKENS)[:, :1],
        "query_dependent_mask",
    ),
    "triangle": (_valid(), lambda m: torch.ones(TOKENS, TOKENS).tril().bool(), "query_dependent_mask"),
    "any bias": (torch.randn(2, 1, 1, TOKENS), lambda m: m, "additive_bias"),
    "soft padding": (torch.rand(2, TOKENS), lambda m: ((1 - m) * -10000.0)[:, None, None], "additive_bias"),
    "weak padding": (_valid(), lambda m: ((1 - m.float()) * -5.0)[:, None, None], "additive_bias"),
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
    gm, _ = dynamo_graph(model, torch.cat([video(tokens=TOKENS)] * 2), _valid())
    assert reasons(gm) == ["query_dependent_mask"]


def test_queries_without_keys_are_no_zeros_where_the_softmax_is_spelled_out():
    """There they have the mean of all values, which only dense attention gives."""

    def attend(query, key, value, mask):
        allowed = mask[:, None, None] & mask[:, None, :, None]
        return (query @ key.mT).masked_fill(~allowed, -1e9).softmax(-1) @ value

    gm, _ = dynamo_graph(model_of(attend), video(tokens=TOKENS), _valid())
    assert reasons(gm) == ["query_dependent_mask"]


def test_a_spelled_out_causal_mask_stays_dense():
    def attend(query, key, value):
        future = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
        return (query @ key.mT).masked_fill(future, float("-inf")).softmax(-1) @ value

    gm, _ = dynamo_graph(model_of(attend), video())
    assert reasons(gm) == ["query_dependent_mask"]


def test_without_any_valid_key_the_result_is_zero_as_in_dense_attention():
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    model = Masked(EXACT["bool"][1]).eval()
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), mask)
    copied, _ = rewritten(gm)
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], model(video(tokens=TOKENS), mask))
