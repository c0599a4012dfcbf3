"""Attentions taken from a sampling model: all of them, unchanged, and without changing what is sampled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from bench.quality.capture import Attention, watch_attention
from svg2_compile.minidit import model as minidit
from svg2_compile.minidit.model import VideoSize, sample_videos

SIZE = VideoSize(2, 16, 20)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.setitem(minidit.CONFIG, "num_layers", 2)
    torch.manual_seed(0)
    model = minidit.build_model().eval().requires_grad_(False)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    return model


def test_every_self_attention_of_the_chosen_steps(model: torch.nn.Module) -> None:
    taken: list[Attention] = []
    video = watch_attention(model, "red brick disc left", 3, SIZE, 4, 2.0, (1, 3), taken.append)
    assert [(attention.step, attention.layer) for attention in taken] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert torch.equal(video, sample_videos(model, ["red brick disc left"], [3], SIZE, 4, 2.0)[0])
    for attention in taken:
        assert attention.query.shape == attention.key.shape == attention.value.shape == (1, 6, SIZE.tokens, 32)
        again = torch.nn.functional.scaled_dot_product_attention(attention.query, attention.key, attention.value)
        torch.testing.assert_close(attention.dense, again)


def test_taken_from_the_branch_with_the_prompt(model: torch.nn.Module) -> None:
    """Without guidance there is only that branch: the same attentions at the first step."""
    guided: list[Attention] = []
    alone: list[Attention] = []
    watch_attention(model, "blue dots star up", 0, SIZE, 2, 3.0, (0,), guided.append)
    watch_attention(model, "blue dots star up", 0, SIZE, 2, 1.0, (0,), alone.append)
    assert len(guided) == len(alone) == 2
    assert torch.equal(guided[1].query, alone[1].query)


def test_refuses_steps_that_do_not_exist(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"steps has \[4\]; valid: 0 to 3"):
        watch_attention(model, "red brick disc left", 0, SIZE, 4, 1.0, (0, 4), lambda _: None)
