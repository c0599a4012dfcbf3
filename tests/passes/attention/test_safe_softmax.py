"""A masked attention of torch.export, whose softmax run_decompositions() guards against rows without a key."""

from __future__ import annotations

import pytest
import torch

from tests.passes.attention_graphs import assert_unchanged, exported_graph, model_of, sdpa, video


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_exported_masks(decomposed, strict):
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[0, ..., 17:] = False
    model = model_of(sdpa)
    gm, inputs = exported_graph(model, video(), mask, decomposed=decomposed, strict=strict)
    with torch.no_grad():
        assert_unchanged(gm, inputs, model(video(), mask))
