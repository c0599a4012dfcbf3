"""Attention that no graph shows stays dense: the result is the model's own, and that nothing is sparse is said."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import svg2_compile
from tests.cases.test_cases import SPARSE, TIME, Model, tokens

_library = torch.library.Library("svg2_test_opaque", "DEF")
_library.define("mix(Tensor query, Tensor key, Tensor value) -> Tensor")


def _mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


_library.impl("mix", _mix, "CPU")
torch.library.register_fake("svg2_test_opaque::mix", lambda query, *_: torch.empty_like(query), lib=_library)


def opaque(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An operator of a C extension, whose name says nothing."""
    return torch.ops.svg2_test_opaque.mix(query, key, value).flatten(2)


def test_attention_of_an_operator_without_a_telling_name(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = Model(None, opaque).eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(tokens(60), TIME)
        with svg2_compile.enable(model, **SPARSE) as enabled:
            torch.testing.assert_close(model(tokens(60), TIME), expected)
            assert not any(run.graph == "sparse" for run in enabled.report().runs)
    assert "dense" in caplog.text
