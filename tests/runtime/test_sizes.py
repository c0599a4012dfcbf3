"""Sizes decide at run time where shapes are dynamic: a short warm-up decides nothing for a long video."""

from __future__ import annotations

import pytest
import torch

import svg2_compile
from tests.support import IDENTITY, assert_close, first_output
from tests.zoo.models import build

OPTIONS = {**IDENTITY, "min_tokens": 200}
SHORT, LONG = 2, 5  # latent frames: 128 and 320 video tokens


def _video(inputs, frames):
    video = torch.randn(1, 4, frames, 16, 16, generator=torch.Generator().manual_seed(frames))
    return {**inputs, "hidden_states": video, "encoder_hidden_states": inputs["encoder_hidden_states"][:1]}


def _watch(model, plain, inputs, order):
    """One video of two steps of every length, each call as dense computes it; (graph, reason) of every call."""
    for frames in order:
        for timestep in (900, 500):
            call = {**_video(inputs, frames), "timestep": torch.full((1,), timestep)}
            with torch.no_grad():
                assert_close(first_output(model, call), first_output(plain, call))
    return [(run.graph, run.reason) for run in svg2_compile.report(model).runs if run.layer == 0][::2]


@pytest.mark.parametrize("order", [(SHORT, LONG, SHORT), (LONG, SHORT, LONG)])
@pytest.mark.parametrize("door", ["enable", "regional", "torch.compile"])
def test_every_size_is_asked_about(order, door):
    torch._dynamo.reset()
    plain, inputs = build("wan_t2v")
    module, _ = build("wan_t2v")
    if door == "torch.compile":
        runs = _watch(torch.compile(module, backend="svg2", dynamic=True, options=OPTIONS), plain, inputs, order)
    else:
        with svg2_compile.enable(module, dynamic=True, regional=door == "regional", **OPTIONS):
            runs = _watch(module, plain, inputs, order)
    expected = {SHORT: ("dense", "short_sequence"), LONG: ("sparse", "sparse")}
    assert set(runs) == set(expected.values())
    assert [graph for graph, _ in _in_order(runs)] == [expected[frames][0] for frames in order]


def _in_order(runs):
    """Neighbours that are equal joined."""
    return [run for index, run in enumerate(runs) if index == 0 or run != runs[index - 1]]


def test_the_report_says_that_sizes_decide():
    plain, inputs = build("wan_t2v")
    module, _ = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", dynamic=True, options=OPTIONS)
    _watch(compiled, plain, inputs, (SHORT,))
    details = {site.detail for site in svg2_compile.report(compiled).sites if site.decision == "sparse"}
    assert details == {
        "where the sizes of a call are worth it; dense at those of the first call: 128 video tokens, fewer than "
        "min_tokens=200"
    }
