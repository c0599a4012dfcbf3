"""The error of a sparse attention on a few rows. Part of the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    q_order: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    rows: int,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Relative error of every head and of all together; see ``ops.sampled_error``."""
    batch, q_heads = query.shape[:2]
    wrong, size = (torch.zeros(batch, q_heads, dtype=compute_dtype, device=query.device) for _ in range(2))
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // key.shape[1])
            num_queries, num_keys = int(q_offsets[b, h, -3]), int(k_offsets[b, g, -2])
            if num_queries == 0:
                continue
            phase = h * 40503 % 65536
            positions = [(r * 65536 + phase) * num_queries // (rows * 65536) for r in range(rows)]
            tokens = q_order[b, h, positions].long()
            keys, values = (x[b, g, :num_keys].to(compute_dtype) for x in (key, value))
            scores = scale * (query[b, h, tokens].to(compute_dtype) @ keys.T)
            exact = torch.softmax(scores, dim=-1) @ values
            wrong[b, h] = (out[b, h, tokens].to(compute_dtype) - exact).square().sum()
            size[b, h] = exact.square().sum()
    return _ratio(wrong, size).to(torch.float32), _ratio(wrong.sum(), size.sum()).to(torch.float32)


def _ratio(wrong: Tensor, size: Tensor) -> Tensor:
    """Of two sums of squares; 0 where there was nothing."""
    return torch.where((wrong == 0) & (size == 0), 0.0, (wrong / size).sqrt())
