"""Rules of the operators that read and write positions by index."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.layout.named_axes import JOINT, VIDEO, layouts

READS = {
    "index_select": (lambda x: x.index_select(1, torch.arange(5)), VIDEO, ("b:2", "video:5", "c:6")),
    "index": (lambda x: x[:, torch.arange(3)], JOINT, ("b:2", "~text+video:3", "c:6")),
    "index_rows": (lambda x: x[torch.arange(2)[:, None], torch.arange(5)], VIDEO, ("b:2", "video:5", "c:6")),
    "gather": (lambda x: x.gather(1, torch.zeros(2, 3, 6, dtype=torch.long)), VIDEO, ("b:2", "video:3", "c:6")),
    "repeat_kv": (lambda x: x.repeat_interleave(2, dim=0), JOINT, ("b:2 x 2", "video:8|text:4", "c:6")),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    function, spec, expected = READS[name]
    assert layouts(function, spec) == expected


def test_writes_at_unknown_places_mix() -> None:
    def scatter(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return x.index_put((torch.arange(2)[:, None], index.long()), source)

    result = layouts(scatter, VIDEO, ("i:3",), ("b:2", "text:3", "c:6"))
    assert result[1] == "~b+c+i+text+video:8"
