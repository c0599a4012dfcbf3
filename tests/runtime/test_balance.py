"""Heads are dealt to ranks so that their loads are as equal as a snake makes them."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.runtime.balance import dealt


def test_dealt_like_a_snake():
    loads = torch.tensor([1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0])
    # Sorted: heads 1 6 3 4 5 2 7 0. To ranks 0 1 1 0 0 1 1 0.
    assert dealt(loads, 2).tolist() == [1, 4, 5, 0, 6, 3, 2, 7]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_head_is_somewhere_and_the_largest_share_shrinks(ranks):
    loads = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) ** 3
    orders = dealt(loads, ranks)
    assert (orders.sort(-1).values == torch.arange(40)).all()
    before, after = (x.reshape(50, ranks, -1).sum(-1).amax(-1) for x in (loads, loads.gather(-1, orders)))
    assert (after <= before + 1e-6).float().mean() > 0.95 and after.mean() <= before.mean()


def test_equal_heads_stay_in_order():
    assert dealt(torch.ones(4), 1).tolist() == [0, 1, 2, 3]
