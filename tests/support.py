"""Helpers that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Every attention sparse from the first call on, with all clusters kept: the result must equal dense attention.
IDENTITY: dict[str, Any] = {
    "top_p": 1.0,
    "min_k_ratio": 1.0,
    "dense_steps": 0,
    "dense_layers": 0,
    "min_tokens": 0,
    "init_iters": 3,
    "num_q_clusters": 5,
    "num_k_clusters": 7,
    "inner_backend": "eager",
    "strict": True,
}

# The same with a real selection.
SELECTION: dict[str, Any] = {**IDENTITY, "top_p": 0.6, "min_k_ratio": 0.1}

# Largest error accepted between two orders of summation, relative to the largest value of the result. One float32
# attention differs by about 1e-6; a few layers with normalisations multiply that.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def first_output(module: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    """The first tensor that a model returns."""
    output = module(**inputs)
    return output[0] if isinstance(output, tuple) else output


def assert_close(actual: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> None:
    """Compare within the tolerance of the dtype, relative to the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not expected.numel():
        return
    scale = expected.float().abs().max().item() or 1.0
    error = (actual.float() - expected.float()).abs().max().item()
    limit = slack * TOLERANCE[expected.dtype] * scale
    assert error <= limit, f"largest error {error:.3e} over the limit {limit:.3e}"


def at_timestep(inputs: dict[str, Any], value: float) -> dict[str, Any]:
    """The inputs of a model with another timestep."""
    timestep = inputs["timestep"]
    return {**inputs, "timestep": torch.full_like(timestep, value)}
