"""The attention kernel alone against dense attention, and other libraries at equal density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.common import Timing
from bench.gpu.context import Context, Prepared, checked_error, dense_error, sample_rows, times
from bench.gpu.peers import flashinfer_attention, make_flex
from bench.rewritten import Rewritten, Settings

__all__ = ["attention", "flashinfer", "flex"]

DENSITY = 0.25
VARIANTS = {
    "density 25 %": Settings(density=0.25),
    "density 12.5 %": Settings(density=0.125),
    "top_p 0.9": Settings(top_p=0.9),
    "all kept": Settings(top_p=1.0),
    "25 %, keys gathered by k_order": Settings(density=0.25, gather_keys=True),
    "25 %, compensation": Settings(density=0.25, compensation=True),
    "25 %, compensation, error routing": Settings(density=0.25, compensation=True, by_error=True),
    "10 %, first order": Settings(density=0.1, first_order=True),
}


def attention(context: Context, name: str) -> dict[str, Any]:
    """Every variant of the attention kernel on one shape, taking turns with dense attention."""
    prepared = context.prepare(name)
    rows = sample_rows(prepared.shape.num_tokens, context.machine.device)
    error, exact = dense_error(prepared, rows)
    variants = {label: Rewritten(prepared.shape, prepared.inputs, settings) for label, settings in VARIANTS.items()}
    errors = {label: _error(label, variant, rows, exact) for label, variant in variants.items()}
    functions = {label: variant.attention for label, variant in variants.items()}
    timings = context.machine.measure({"dense": prepared.dense_call, **functions}, context.repeats)
    dense = timings.pop("dense")
    return {
        "shape": _describe(prepared),
        "dense": {
            "kernel": prepared.dense.name,
            "candidates_ms": prepared.dense.candidates,
            "relative_error": error,
            **times(dense, prepared.shape.flops()),
        },
        "variants": {
            label: {
                **_speed(context, prepared, variants[label], timing, dense),
                "relative_error": errors[label],
                "relative_error_over_dense": round(errors[label] / error, 3),
            }
            for label, timing in timings.items()
        },
    }


def _describe(prepared: Prepared) -> dict[str, Any]:
    shape = prepared.shape
    return {
        "name": shape.name,
        "heads": shape.num_heads,
        "video_tokens": shape.video_tokens,
        "context_tokens": shape.context_tokens,
        "head_dim": shape.head_dim,
        "clusters": [shape.num_q_clusters, shape.num_k_clusters],
        "dtype": str(shape.dtype).removeprefix("torch."),
    }


def _error(label: str, variant: Rewritten, rows: Tensor, exact_dense: Tensor) -> float:
    """Against float64 over the same blocks; with every block kept against dense attention in float64."""
    keeps_all = variant.settings.density is None and variant.settings.top_p >= 1
    exact = exact_dense if keeps_all else variant.exact_rows(rows)
    return checked_error(label, variant.out[0][:, rows], exact)


def _speed(context: Context, prepared: Prepared, variant: Rewritten, timing: Timing, dense: Timing) -> dict[str, Any]:
    shape, densities = prepared.shape, variant.densities()
    density = float(densities.mean())
    token_bytes = shape.head_dim * shape.dtype.itemsize
    tensor_bytes = shape.num_heads * shape.num_tokens * token_bytes
    return {
        "density": round(density, 4),
        "density_of_heads": [round(float(densities.min()), 4), round(float(densities.max()), 4)],
        **times(timing, shape.flops(density)),
        "launch_ms": context.machine.launch_ms(variant.attention),
        "efficiency": round(density * dense.median_ms / timing.median_ms, 4),
        "speedup": round(dense.median_ms / timing.median_ms, 3),
        "workspace_mib": context.machine.workspace_mib(variant.attention),
        # Each of Q, K, V and O once: what device memory must move at the least.
        "least_bytes": 4 * tensor_bytes,
        # Keys and values that tiles of 128 query rows gather: what the caches deliver.
        "gathered_bytes": 2 * variant.keys_read() * token_bytes,
    }


def flex(context: Context, name: str) -> dict[str, Any]:
    """FlexAttention with random 128 x 128 blocks at the density of the 25 % variant, beside it and dense."""
    prepared = context.prepare(name)
    ours = Rewritten(prepared.shape, prepared.inputs, Settings(density=DENSITY))
    density = float(ours.densities().mean())
    peer = make_flex(*prepared.tokens, density)
    rows = sample_rows(peer.num_tokens, context.machine.device)
    error = checked_error("FlexAttention", peer.run()[0][:, rows], peer.exact_rows(*prepared.tokens, rows))
    timings = context.machine.measure(
        {"dense": prepared.dense_call, "ours": ours.attention, "peer": peer.run}, context.repeats
    )
    shape = prepared.shape
    # It leaves out the tokens that fill no block of 128: work and dense time are scaled to what it does.
    share = (peer.num_tokens / shape.num_tokens) ** 2
    return {
        "shape": _describe(prepared),
        "peer": "FlexAttention, 128 x 128 blocks",
        "num_tokens": peer.num_tokens,
        "density": round(peer.density, 4),
        **times(timings["peer"], share * shape.flops(peer.density)),
        "relative_error": error,
        "efficiency": round(share * peer.density * timings["dense"].median_ms / timings["peer"].median_ms, 4),
        "ours": {"density": round(density, 4), **times(timings["ours"], shape.flops(density))},
    }


def flashinfer(context: Context, name: str) -> dict[str, Any]:
    """flashinfer's variable-block wrapper on the same blocks; its plan on the host is timed apart."""
    prepared = context.prepare(name)
    ours = Rewritten(prepared.shape, prepared.inputs, Settings(density=DENSITY))
    plan, run = flashinfer_attention(ours)
    rows = sample_rows(prepared.shape.num_tokens, context.machine.device)
    # Its rows come in permuted order: those that hold the sampled tokens, per head.
    position = ours.q_order[0].long().argsort(dim=-1)[:, rows]
    actual = torch.stack([out[where] for out, where in zip(run(), position, strict=True)])
    error = checked_error("flashinfer", actual, ours.exact_rows(rows))
    functions = {"dense": prepared.dense_call, "ours": ours.attention, "peer": run, "plan": plan}
    timings = context.machine.measure(functions, context.repeats)
    density = float(ours.densities().mean())
    return {
        "shape": _describe(prepared),
        "peer": "flashinfer VariableBlockSparseAttentionWrapper",
        "density": round(density, 4),
        **times(timings["peer"], prepared.shape.flops(density)),
        "plan": times(timings["plan"]),
        "relative_error": error,
        "efficiency": round(density * timings["dense"].median_ms / timings["peer"].median_ms, 4),
        "ours": times(timings["ours"], prepared.shape.flops(density)),
    }
