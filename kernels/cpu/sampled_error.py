"""The error of a sparse attention on a few rows, on the CPU: a small dense attention for every head."""

from __future__ import annotations

import torch
from torch import Tensor

from svg2_compile.kernels.sampling import error_of_sums, sampled_tokens


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
) -> tuple[Tensor, Tensor]:
    """Relative error of every head and of all together; see ``ops.sampled_error``."""
    batch, kv_heads = key.shape[:2]
    sharing = query.shape[1] // max(kv_heads, 1)
    tokens = sampled_tokens(q_order, q_offsets, rows)
    wrong, size = (query.new_zeros(query.shape[:2], dtype=torch.float32) for _ in range(2))
    for b in range(batch if tokens.numel() else 0):
        for g in range(kv_heads):
            num_keys = int(k_offsets[b, g, -2])
            keys, values = (x[b, g, :num_keys].to(torch.float32) for x in (key, value))
            for h in range(g * sharing, (g + 1) * sharing):
                sampled = query[b, h].index_select(0, tokens[b, h]).to(torch.float32)
                weights = torch.softmax((sampled * scale) @ keys.t(), dim=-1)
                exact = weights @ values
                wrong[b, h] = exact.sub(out[b, h].index_select(0, tokens[b, h])).square_().sum()
                size[b, h] = exact.square_().sum()
    return error_of_sums(wrong, size, q_offsets)
