"""Cuts at a place that depends on data: their lengths follow from it, and what is video stays known behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svg2_compile.passes.layout.lengths import counts_from_end, size_expr
from tests.passes.attention_graphs import DIM, dynamo_graph, model_of, reasons, sdpa, video


class Joint(nn.Module):
    """Two layers of joint attention with the text that a mask picks, cut off from the end behind each."""

    def __init__(self, from_end: bool) -> None:
        super().__init__()
        self.first, self.second, self.text = model_of(sdpa), model_of(sdpa), nn.Linear(DIM, DIM)
        self.from_end = from_end

    def forward(self, hidden_states: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = self.text(torch.cat([text[mask], text[~mask]]))[None]
        for layer in (self.first, self.second):
            joint = layer(torch.cat([hidden_states, text], 1))
            place = -text.shape[1] if self.from_end else hidden_states.shape[1]
            hidden_states, text = hidden_states + joint[:, :place], joint[:, place:]
        return hidden_states


@pytest.mark.parametrize("from_end", [True, False])
def test_what_is_cut_off_by_a_length_that_is_data(from_end: bool) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm, _ = dynamo_graph(Joint(from_end).eval(), video(1), torch.randn(7, DIM), torch.arange(7) < 4)
    assert reasons(gm) == ["sparse", "sparse"]


def test_which_places_are_counted_from_the_end() -> None:
    import sympy

    tokens = sympy.Symbol("u0", integer=True)
    assert counts_from_end(-tokens) and counts_from_end(size_expr(-3)) and counts_from_end(-tokens - 1)
    assert not any(map(counts_from_end, (tokens, size_expr(0), size_expr(3), tokens - 1)))
