"""The gate: small problems of every kind against float64, before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bench.clustered_inputs import clustered_inputs
from bench.gpu.context import Context, checked_error
from bench.gpu.dense import exact_dense_rows
from bench.rewritten import Rewritten, Settings, make_inputs

__all__ = ["gate"]

VARIANTS = {
    "all kept": Settings(top_p=1.0),
    "density 25 %": Settings(density=0.25),
    "keys gathered": Settings(density=0.25, gather_keys=True),
    "compensation": Settings(density=0.25, compensation=True),
    "error routing": Settings(density=0.25, compensation=True, by_error=True),
    "first order": Settings(density=0.25, first_order=True),
}


def gate(context: Context) -> dict[str, Any]:
    """Relative errors by head_dim and variant, all tokens. Raises AssertionError where one is too large."""
    errors = {}
    for head_dim in (64, 128):
        shape = replace(
            context.shape("hunyuanvideo-720p"),
            num_heads=2,
            head_dim=16 if context.rehearsal else head_dim,
            video_tokens=257 if context.rehearsal else 3001,
            context_tokens=9 if context.rehearsal else 77,
            num_q_clusters=3 if context.rehearsal else 12,
            num_k_clusters=8 if context.rehearsal else 40,
        )
        inputs = make_inputs(shape, clustered_inputs(shape, context.machine.device))
        every = torch.arange(shape.num_tokens, device=context.machine.device)
        for name, settings in VARIANTS.items():
            rewritten = Rewritten(shape, inputs, settings)
            exact = rewritten.exact_rows(every)
            errors[f"D {head_dim}, {name}"] = checked_error(name, rewritten.out[0], exact)
        everything = Rewritten(shape, inputs, VARIANTS["all kept"]).out[0]
        dense = exact_dense_rows(*inputs[:3], every)
        errors[f"D {head_dim}, all kept, against dense"] = checked_error("all kept", everything, dense)
    return {"relative_errors": errors}
