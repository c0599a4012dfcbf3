"""Budgets as the host sees them."""

from __future__ import annotations

import torch

from svg2_compile.passes.error_guard import GIVEN_UP
from svg2_compile.runtime.budgets import late_copy, which_are_given_up


def test_the_host_sees_what_was_given_up() -> None:
    budgets = [torch.tensor(0.1), torch.tensor(GIVEN_UP), torch.tensor(1.9)]
    copy = late_copy(budgets)
    assert which_are_given_up(copy) == [1]
    budgets[0].fill_(GIVEN_UP)
    assert which_are_given_up(copy) == [1]  # a copy, whatever becomes of the tensors


def test_what_has_not_arrived_yet_is_not_given_up() -> None:
    assert which_are_given_up(torch.zeros(3)) == []
