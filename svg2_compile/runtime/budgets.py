"""Budgets that follow an error, as the host sees them: late, and without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svg2_compile.passes.error_guard import GIVEN_UP

__all__ = ["late_copy", "which_are_given_up"]


def late_copy(budgets: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [n] on the host, with the budgets [] as soon as the device has got to them; zeros until then."""
    device = budgets[0].device.type
    together = torch.stack([budget.detach() for budget in budgets])
    if device == "cpu":
        return together
    copy = torch.zeros(len(budgets), pin_memory=device == "cuda")
    if device == "cuda":
        copy.copy_(together, non_blocking=True)
    return copy  # other devices cannot copy behind the host's back: there a layer is exact without being told of


def which_are_given_up(copy: torch.Tensor) -> list[int]:
    """The positions of those that have missed their target for good."""
    return [position for position, budget in enumerate(copy.tolist()) if budget >= GIVEN_UP]
