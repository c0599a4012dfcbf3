"""Arguments of ``svg2::sampled_error`` that its tests share, and how far an implementation may be from the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import make_problem

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"num_queries": 1, "num_keys": 1, "num_q_clusters": 1, "num_k_clusters": 1},
    "grouped heads, batch 2": {"batch": 2, "q_heads": 4, "kv_heads": 2},
    "odd head_dim": {"head_dim": 19},
    "value wider": {"head_dim": 8, "value_dim": 24},
    "value narrower": {"head_dim": 24, "value_dim": 7},
    "many keys": {"num_keys": 1501, "input_scale": 3.0},
    "no keys": {"num_keys": 0},
    "no queries": {"num_queries": 0},
    "no batch": {"batch": 0},
}


def arguments(rows: int = 8, noise: float = 0.03, **shape: Any) -> tuple[Any, ...]:
    """A result that is off by ``noise`` in every clustered row; tokens are in another order than the clusters'."""
    problem = make_problem(**shape)
    generator = torch.Generator().manual_seed(1)
    out = torch.zeros(*problem.query.shape[:3], problem.value.shape[3])
    sharing = problem.query.shape[1] // max(problem.key.shape[1], 1)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            end = int(problem.k_offsets[b, h // sharing, -2])  # all blocks but the null block
            keys, values = (x[b, h // sharing, :end].float() for x in (problem.key, problem.value))
            scores = problem.scale * (problem.query[b, h].float() @ keys.T)
            exact = torch.softmax(scores, dim=-1) @ values
            out[b, h] = exact * (1 + noise * torch.randn(exact.shape, generator=generator))
    out = out.to(problem.query.dtype)
    order = torch.arange(out.shape[2] - 1, -1, -1, dtype=torch.int32).expand(out.shape[:3])
    query, out = (x.flip(2).transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.query, out))
    tokens = (query, problem.key, problem.value, out, order)
    return *tokens, problem.q_offsets, problem.k_offsets, problem.scale, rows


def oracle(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    doubled: list[Any] = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return reference.sampled_error(*doubled, compute_dtype=torch.float64)


def check(args: tuple[Any, ...], found: tuple[Tensor, Tensor], unit: float = 2.0**-20) -> None:
    """Errors to a rounding of the result, which a small error is the difference of."""
    for mine, theirs in zip(found, oracle(args), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=unit)
