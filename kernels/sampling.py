"""What the implementations of ``svg2::sampled_error`` share: which rows are looked at, and what their sums say."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["error_of_sums", "sampled_tokens"]

_ONE = 1 << 16  # phases of heads are multiples of 1 / _ONE
_STRIDE = 40503  # _ONE over the golden ratio: phases of any number of heads are spread well


def sampled_tokens(q_order: Tensor, q_offsets: Tensor, rows: int) -> Tensor:
    """int64 [B, H, rows]: the tokens at evenly spread positions of the clustered part of an order [B, H, N]. Any token
    where nothing is clustered; no rows where there are no tokens. Reads nothing back."""
    heads, num_tokens = q_order.shape[1:]
    phase = torch.arange(heads, device=q_order.device).mul(_STRIDE).remainder(_ONE).unsqueeze(1)
    step = torch.arange(rows if num_tokens else 0, device=q_order.device) * _ONE
    clustered = q_offsets.narrow(2, q_offsets.shape[2] - 3, 1).to(torch.int64)
    positions = (step + phase) * clustered // (rows * _ONE)
    return q_order.gather(2, positions).to(torch.int64)


def error_of_sums(wrong: Tensor, size: Tensor, q_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """|| out - exact || / || exact ||, from the sums of squares [B, H] of both: of every head, and of all of them."""
    is_empty = q_offsets.narrow(2, q_offsets.shape[2] - 3, 1).squeeze(2) == 0
    wrong, size = wrong.masked_fill(is_empty, 0.0), size.masked_fill(is_empty, 0.0)
    return _ratio(wrong, size), _ratio(wrong.sum(), size.sum())


def _ratio(wrong: Tensor, size: Tensor) -> Tensor:
    nothing = (wrong == 0).logical_and(size == 0)
    return (wrong / size).sqrt().masked_fill(nothing, 0.0)
