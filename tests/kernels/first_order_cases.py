"""Problems of first-order compensation that several tests share, and what the oracle makes of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import EDGE_SHAPES, FirstOrder, assert_within_budget

F64 = torch.float64
SHAPES: dict[str, dict[str, Any]] = {
    **EDGE_SHAPES,
    "plain": {},
    "odd head_dim": {"head_dim": 19},
    "value wider": {"head_dim": 8, "value_dim": 24},
    "value narrower": {"head_dim": 24, "value_dim": 7},
    "many keys": {"num_queries": 70, "num_keys": 1501, "num_q_clusters": 3, "num_k_clusters": 12},
}


def to_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def attention_answers(case: FirstOrder) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (out, lse) of the oracle, and its out in float32, rounded to the inputs' dtype."""
    args = case.attention_args
    out, lse = reference.first_order_attention(*to_double(args), compute_dtype=F64)
    return out, lse, reference.first_order_attention(*args)[0]


def density_of_clusters(block_map: Tensor, q_offsets: Tensor, k_offsets: Tensor) -> tuple[float, float]:
    """Selected pairs of clusters over all of them, over all heads of the only batch item, and the largest block's."""
    counts = (q_offsets.shape[2] - 3, k_offsets.shape[2] - 3)
    sharing = q_offsets.shape[1] // k_offsets.shape[1]
    q_sizes = q_offsets.diff(dim=-1)[0, :, : counts[0]].double()
    k_sizes = k_offsets.diff(dim=-1)[0, :, : counts[1]].double().repeat_interleave(sharing, dim=0)
    pairs = q_sizes.unsqueeze(2) * k_sizes.unsqueeze(1)
    kept = pairs * block_map[0, :, : counts[0], : counts[1]]
    every = pairs.sum().clamp(min=1)
    return float(kept.sum() / every), float(pairs.max() / every)


def check_estimates(case: FirstOrder, log_mass: Tensor, log_error: Tensor, mass_roundings: float = 64.0) -> None:
    """log_mass to roundings of its largest value; log_error to 5 %, where it is more than what rounding makes."""
    finite = case.log_mass.isfinite()
    assert torch.equal(log_mass.isfinite(), finite)
    assert_within_budget(log_mass[finite], case.log_mass[finite].double(), roundings=mass_roundings)
    if not case.log_error.numel() or not case.problem.value.numel():
        return
    size = case.problem.value.double().abs().amax().clamp(min=1).log()
    from_rounding = 2 * (case.log_mass[..., :-2] + math.log(2.0**-20 * magnitude(case)) + size)
    certain = case.log_error > from_rounding + math.log(1e3)
    torch.testing.assert_close(log_error[certain], case.log_error[certain], rtol=1e-4, atol=0.05)


def check_residual(case: FirstOrder, residual: Tensor, exact: Tensor, unit: float = 2.0**-24) -> None:
    """To roundings of the values that it is a sum of."""
    of_values = 2 * float(case.problem.value.double().abs().max()) if case.problem.value.numel() else 0.0
    torch.testing.assert_close(residual, exact, rtol=0, atol=16 * unit * magnitude(case) * of_values)


def check_terms(case: FirstOrder, residual: Tensor, slope: Tensor, unit: float = 2.0**-24) -> None:
    """Both to roundings of what they are sums of: values, and products of values with keys."""
    problem = case.problem
    if not problem.value.numel():
        assert not bool(residual.any()) and not bool(slope.any())
        return
    check_residual(case, residual, case.residual, unit)
    of_values, of_keys = (2 * float(x.double().abs().max()) for x in (problem.value, problem.key))
    torch.testing.assert_close(slope, case.slope, rtol=0, atol=16 * unit * of_values * of_keys * problem.scale)


def magnitude(case: FirstOrder) -> float:
    """Of the logits, in ones: by it a rounding of a logit is larger than one of a weight."""
    finite = case.log_mass[case.log_mass.isfinite()]
    return max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
