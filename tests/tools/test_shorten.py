"""A shortened model is traced in the stead of the whole: the report must be that of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import svg2_compile
from svg2_compile.tools.shorten import KEPT, leave_first_layers_dense, shortened, with_all_blocks
from tests.zoo.models import build

OPTIONS = {"min_tokens": 0, "dense_layers": 0}


class Block(nn.Module):
    def __init__(self, width: int = 32, number: int = 0) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two lists of blocks, around one that is different."""

    def __init__(self, make: Callable[[int], Block] = lambda number: Block()) -> None:
        super().__init__()
        self.first = nn.ModuleList(make(number) for number in range(6))
        self.middle = Block()
        self.second = nn.ModuleList(make(number) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, self.middle, *self.second):
            x = block(x)
        return x


@pytest.mark.parametrize("dense_layers", [0, 2, 0.3, 1])
def test_the_report_is_that_of_the_whole_model(dense_layers: int | float) -> None:
    model, x = Model().eval(), torch.randn(1, 48, 32)
    whole = svg2_compile.explain(model, x, options={"min_tokens": 0, "dense_layers": dense_layers})
    torch._dynamo.reset()
    with shortened(model) as cut:
        assert cut == {"first": 6, "second": 4}
        assert (len(model.first), len(model.second)) == (KEPT, KEPT)
        few = svg2_compile.explain(model, x, options=OPTIONS)
    assert (len(model.first), len(model.second)) == (6, 4)
    sites = leave_first_layers_dense(with_all_blocks(few.sites, cut), dense_layers)
    assert not whole.graphs[0].regional
    assert [dataclasses.asdict(site) for site in sites] == [dataclasses.asdict(site) for site in whole.sites]


def test_blocks_that_differ_are_all_kept() -> None:
    with shortened(Model(lambda number: Block(number=number))) as cut:
        assert cut == {}


def test_an_error_puts_the_blocks_back() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match="stop"), shortened(model):
        raise RuntimeError("stop")
    assert len(model.first) == 6


def test_a_real_model_with_many_layers() -> None:
    small, inputs = build("wan_t2v")
    config = {**dict(small.config), "num_layers": 5}  # type: ignore[arg-type]
    model = type(small)(**config).eval()
    whole = svg2_compile.explain(model, options=OPTIONS, **inputs)
    torch._dynamo.reset()
    with shortened(model) as cut:
        few = svg2_compile.explain(model, options=OPTIONS, **inputs)
    assert cut == {"blocks": 5}
    assert with_all_blocks(few.sites, cut) == whole.sites
