"""Over Dynamo's recompile limit a model runs eagerly: its attention alone is compiled, or what stays dense is said."""

from __future__ import annotations

import contextlib
import contextvars

import pytest
import torch

import svg2_compile
from svg2_compile.hosts import compiled_call, dynamo
from tests.e2e.pipelines import build
from tests.support import SELECTION


def _over_the_recompile_limit(model):
    """A call, and one of another batch that Dynamo does not compile any more."""
    text = torch.randn(1, 12, 16)
    model(torch.randn(1, 4, 2, 16, 16), timestep=torch.tensor([900]), encoder_hidden_states=text)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "_settings", contextlib.nullcontext)
        text = text.expand(2, -1, -1)
        model(torch.randn(2, 4, 2, 16, 16), timestep=torch.tensor([900, 900]), encoder_hidden_states=text)


def test_over_a_recompile_limit_attention_alone_is_sparse():
    model = build("wan").pipe.transformer
    with svg2_compile.enable(model, **SELECTION) as enabled, torch.no_grad():
        _over_the_recompile_limit(model)
        runs = enabled.report().runs
    alone = [run for run in runs if run.site == "scaled_dot_product_attention"]
    assert len(runs) == 2 * len(alone) and {run.graph for run in alone} == {"sparse"}


def test_a_recompile_limit_is_said_where_attention_is_hidden_too(caplog, monkeypatch):
    monkeypatch.setattr(compiled_call, "attend_alone", contextvars.ContextVar("read by nobody"))
    model = build("wan").pipe.transformer
    with svg2_compile.enable(model, **SELECTION) as enabled, torch.no_grad():
        _over_the_recompile_limit(model)
    assert "runs eagerly and dense" in caplog.text and any("eagerly" in note for note in enabled.report().notes)
