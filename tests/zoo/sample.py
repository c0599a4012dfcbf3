"""What every factory of the zoo yields, and a mask that several need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Sample = tuple[nn.Module, dict[str, Any]]


def padding_mask(batch: int, length: int, valid: int, dtype: torch.dtype) -> Tensor:
    mask = torch.ones(batch, length, dtype=dtype)
    mask[:, valid:] = 0
    return mask
