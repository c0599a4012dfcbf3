"""Where the tokens of a video cannot be followed, the reason names the operator that lost them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svg2_compile.passes.sites import Skip
from tests.passes.attention_graphs import DIM, decide, dynamo_graph, model_of, sdpa, video


class Packed(nn.Module):
    """Tokens of a video and of its sound, laid where an index says."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.sound = model_of(sdpa), nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, sound: Tensor, places: Tensor) -> Tensor:
        joint = torch.cat([hidden_states, self.sound(sound)], 1)
        packed = self.attention(torch.zeros_like(joint).index_copy(1, places, joint))
        return packed[:, places][:, : hidden_states.shape[1]]


def test_tokens_that_an_index_scatters_stay_dense_and_say_where() -> None:
    gm, _ = dynamo_graph(Packed().eval(), video(1), torch.randn(1, 5, DIM), torch.randperm(26))
    (decision,) = decide(gm)
    assert isinstance(decision, Skip) and decision.reason == "unknown_layout"
    assert "lost at index_copy" in decision.detail and "in their order" in decision.detail
