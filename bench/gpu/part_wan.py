"""One denoising step of a whole transformer, dense and sparse: a Wan 2.1 14B of diffusers with random weights."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import Timing
from bench.gpu.context import Context
from bench.gpu.peers import NotMeasured
from svg2_compile.api import enable

__all__ = ["PUBLISHED", "wan_block"]

PUBLISHED = {0.295: 1.60, 0.129: 1.89}  # density -> speed-up of a whole video (SVG2, Wan 2.1 14B T2V 720p)
# The settings of the published figures: the first 20 % of the steps and the first 3 % of the layers stay dense.
DENSE_SHARE = 0.2 + 0.8 * 0.03
WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """A model and the arguments of its call, but for latents and timestep."""

    model: nn.Module
    scheduler: Any
    latents: Tensor
    prompt: Tensor

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.model(
            latents, timestep=timestep[None], encoder_hidden_states=self.prompt, return_dict=False
        )[0]
        return out


def wan_block(context: Context, name: str) -> dict[str, Any]:
    """Median time of a model call: dense before and after, sparse at both published densities."""
    if importlib.util.find_spec("diffusers") is None:
        raise NotMeasured("diffusers is not installed")
    prepared = context.prepare(name)
    dense_kernel, shape = prepared.dense, prepared.shape
    del prepared
    context.forget()
    step = _build(context)
    backend = "eager" if context.rehearsal else "inductor"
    repeats = max(2, context.repeats // 2)
    # The best dense kernel for self-attention; another where it does not take a cross-attention.
    kernels = [dense_kernel.backend, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(kernels, set_priority=True):
        # The blocks alone, as the sparse model is compiled below.
        step.model.compile_repeated_blocks(backend=backend, fullgraph=True)  # type: ignore[operator]
        before = _denoise(context, step, repeats)
        clusters = {"num_q_clusters": shape.num_q_clusters, "num_k_clusters": shape.num_k_clusters}
        options = {**clusters, "inner_backend": backend}
        sparse = {density: _sparse(context, step, repeats, {**options, "density": density}) for density in PUBLISHED}
        after = _denoise(context, step, repeats)
    dense = Timing(before.runs_ms + after.runs_ms)
    return {
        "shape": shape.name,
        "layers": len(step.model.blocks),  # type: ignore[arg-type]
        "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
        "weights": "random",
        "compilation": f"regional, {backend}",
        "dense_attention": dense_kernel.name,
        "dense": {**dense.to_json(), "before_ms": round(before.median_ms, 2), "after_ms": round(after.median_ms, 2)},
        "sparse": {f"density {density:.1%}": _describe(sparse[density], dense, density) for density in PUBLISHED},
    }


def _describe(measured: tuple[Timing, float], dense: Timing, density: float) -> dict[str, Any]:
    timing, reached = measured
    speedup = dense.median_ms / timing.median_ms
    return {
        "density": round(reached, 4),
        **timing.to_json(),
        "speedup_of_model_call": round(speedup, 3),
        # Embeddings, norms and the head are too small to count: a model of 40 layers has the same speed-up.
        "projected_for_a_video": round(1 / (DENSE_SHARE + (1 - DENSE_SHARE) / speedup), 3),
        "published_for_a_video": PUBLISHED[density],
    }


def _build(context: Context) -> Step:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    device, rehearsal = context.machine.device, context.rehearsal
    configuration = {**WAN_14B, **TINY} if rehearsal else WAN_14B
    dtype = torch.bfloat16
    torch.manual_seed(0)
    with _default_dtype(dtype), torch.device(device):
        model = WanTransformer3DModel(**configuration, num_layers=2 if rehearsal else 8).eval()
        # 21 x 45 x 80 = 75,600 tokens.
        latents = torch.randn(1, 16, *((3, 20, 20) if rehearsal else (21, 90, 160)))
        prompt = torch.randn(1, TEXT_TOKENS, configuration["text_dim"])
    return Step(model, FlowMatchEulerDiscreteScheduler(shift=5.0), latents, prompt)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _sparse(context: Context, step: Step, repeats: int, options: dict[str, Any]) -> tuple[Timing, float]:
    """Time and mean density of steps that continue from the centroids of the step before."""
    options = {**options, "dense_steps": 0, "dense_layers": 0, "min_tokens": 0, "init_iters": 10, "strict": True}
    with enable(step.model, regional=True, scheduler=step.scheduler, **options) as enabled:
        timing = _denoise(context, step, repeats)
        report = enabled.report()
    if {run.graph for run in report.runs} != {"sparse"}:
        raise AssertionError(f"not every call ran sparse: {report}")
    return timing, report.mean_density or 0.0


def _denoise(context: Context, step: Step, repeats: int) -> Timing:
    """Model calls of a denoising loop; the first two, which compile and start cold, do not count."""
    device, latents = context.machine.device, step.latents
    step.scheduler.set_timesteps(repeats + 2, device=device)
    runs = []
    for timestep in step.scheduler.timesteps:
        milliseconds, velocity = _timed(context, functools.partial(step, latents, timestep))
        if not bool(velocity.isfinite().all()):
            raise AssertionError("the model's output is not finite")
        latents = step.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        runs.append(milliseconds)
    return Timing(tuple(runs[2:]))


def _timed(context: Context, call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds of the device's work, and the result."""
    context.machine.synchronize()
    if not context.machine.is_cuda:
        start = time.perf_counter()
        result = call()
        return 1e3 * (time.perf_counter() - start), result
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result
