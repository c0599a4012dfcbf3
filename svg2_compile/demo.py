"""``svg2 demo``: a diffusers video transformer, dense and sparse side by side, with classifier-free guidance."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from svg2_compile.api import enable
from svg2_compile.explanation import explain
from svg2_compile.inner_backend import compile_inner
from svg2_compile.reports import Report

__all__ = [
    "DemoOptions",
    "DemoResult",
    "demo_inputs",
    "demo_model",
    "demo_scheduler",
    "demo_settings",
    "denoise",
    "run_demo",
    "warm_up",
]


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs. frames, height and width are those of the latent video; tokens are 2 x 2 latents."""

    frames: int = 16
    height: int = 40
    width: int = 48
    steps: int = 8
    dense_steps: int = 2
    top_p: float = 0.9
    guidance: float = 3.0
    layers: int = 3
    seed: int = 0
    inner_backend: str = "inductor"
    out: Path = Path("svg2-demo")

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 2) * (self.width // 2)


@dataclass(frozen=True)
class Loop:
    """One denoised video: latents [1, C, F, H, W] and the seconds of every step."""

    latents: torch.Tensor
    step_seconds: list[float]

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    dense: Loop
    sparse: Loop
    report: Report
    psnr: float
    picture: Path

    @property
    def speedup(self) -> float:
        return self.dense.seconds / self.sparse.seconds


def demo_model(options: DemoOptions) -> torch.nn.Module:
    """A small diffusers WanTransformer3DModel with random weights.

    Attention of random weights is diffuse, that of trained models is not: the query and key norms are scaled up, so
    that the attention concentrates and there is something to select.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(options.seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=options.layers,
        rope_max_seq_len=256,
    ).eval()
    for name, parameter in model.named_parameters():
        if "attn1.norm_" in name:
            parameter.data.mul_(QUERY_KEY_GAIN)
    return model


QUERY_KEY_GAIN = 2.5


def demo_settings(options: DemoOptions) -> dict[str, Any]:
    """The svg2 options of the demo. A loop this short would not pay back the 50 iterations of a long one's start."""
    return {"top_p": options.top_p, "min_tokens": 0, "dense_layers": 0, "init_iters": 10}


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Run the demo, print what it finds and write a picture.

    Raises:
        ImportError: diffusers or Pillow is missing; the message names the extra to install.
    """
    _need_extras()
    # Several demos in one process would otherwise add up to Dynamo's limit of recompilations.
    torch._dynamo.reset()
    model = demo_model(options)
    noise, prompts = demo_inputs(options)
    console.print(
        f"[bold]svg2 demo[/bold]: diffusers {type(model).__name__}, {options.layers} layers, "
        f"{options.tokens} video tokens, {options.steps} steps with guidance "
        "(random weights, so the pictures are abstract)\n"
    )
    call = {"timestep": torch.tensor([999.0]), "encoder_hidden_states": prompts[0], "return_dict": False}
    settings = demo_settings(options)
    console.print(explain(model, noise, options=settings, **call).table())

    with torch.no_grad(), Progress(console=console, transient=True) as progress:
        dense = _dense_loop(model, options, noise, prompts, progress)
        sparse, report = _sparse_loop(model, options, noise, prompts, progress, settings)
    picture = _picture(options, dense, sparse)
    result = DemoResult(dense, sparse, report, psnr(sparse.latents, dense.latents), picture)
    _print_result(result, options, console)
    return result


def psnr(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of the reference."""
    error = (value.double() - reference.double()).pow(2).mean().item()
    span = (reference.max() - reference.min()).item()
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def _need_extras() -> None:
    try:
        import diffusers  # noqa: F401
        from PIL import Image  # noqa: F401
    except ImportError as error:
        raise ImportError("svg2 demo needs diffusers and Pillow: svg2-compile[diffusers,plots]") from error


def demo_inputs(options: DemoOptions) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents to start from (a moving pattern under noise) and the prompts of the two guidance branches."""
    generator = torch.Generator().manual_seed(options.seed)
    frames, height, width = options.frames, options.height, options.width
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    waves = torch.randn(16, 4, generator=generator) * 2
    phase = waves[:, 0, None, None, None] * x + waves[:, 1, None, None, None] * y + waves[:, 2, None, None, None] * t
    disc = ((x - 0.6 * torch.cos(3 * t)) ** 2 + (y - 0.6 * torch.sin(3 * t)) ** 2 < 0.15).float()
    pattern = torch.sin(2 * phase + waves[:, 3, None, None, None]) + 1.5 * disc * waves[:, 3, None, None, None].sign()
    noise = torch.randn(pattern.shape, generator=generator)
    prompts = [torch.randn(1, 32, 64, generator=generator) for _ in range(2)]
    return (0.8 * pattern + 0.6 * noise)[None], prompts


def denoise(
    model: Callable[..., Any],
    scheduler: Any,
    options: DemoOptions,
    latents: torch.Tensor,
    prompts: list[torch.Tensor],
    tick: Callable[[], None],
) -> Loop:
    """The denoising loop of a diffusers pipeline: per step a conditional and an unconditional call."""
    scheduler.set_timesteps(options.steps)
    seconds = []
    for timestep in scheduler.timesteps:
        begin = time.perf_counter()
        branches = [
            model(latents, timestep=timestep[None], encoder_hidden_states=prompt, return_dict=False)[0]
            for prompt in prompts
        ]
        velocity = branches[1] + options.guidance * (branches[0] - branches[1])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        seconds.append(time.perf_counter() - begin)
        tick()
    return Loop(latents, seconds)


def demo_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _dense_loop(
    model: torch.nn.Module, options: DemoOptions, noise: torch.Tensor, prompts: list[torch.Tensor], progress: Progress
) -> Loop:
    task = progress.add_task(f"dense: compiling ({options.inner_backend})", total=options.steps)

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_inner(gm, inputs, options.inner_backend)

    compiled = torch.compile(model._call_impl, backend=inner)
    compiled(noise, timestep=torch.tensor([999.0]), encoder_hidden_states=prompts[0], return_dict=False)
    progress.update(task, description="dense: denoising")
    return denoise(compiled, demo_scheduler(), options, noise, prompts, lambda: progress.advance(task))


def _sparse_loop(
    model: torch.nn.Module,
    options: DemoOptions,
    noise: torch.Tensor,
    prompts: list[torch.Tensor],
    progress: Progress,
    settings: dict[str, Any],
) -> tuple[Loop, Report]:
    task = progress.add_task(f"sparse: compiling ({options.inner_backend})", total=options.steps)
    scheduler = demo_scheduler()
    enabled = enable(
        model, scheduler=scheduler, dense_steps=options.dense_steps, inner_backend=options.inner_backend, **settings
    )
    with enabled:
        warm_up(model, scheduler, options, noise, prompts[0])
        enabled.reset()
        enabled.session.history.clear()
        progress.update(task, description="sparse: denoising")
        loop = denoise(model, scheduler, options, noise, prompts, lambda: progress.advance(task))
        return loop, enabled.report()


def warm_up(
    model: torch.nn.Module, scheduler: Any, options: DemoOptions, noise: torch.Tensor, prompt: torch.Tensor
) -> None:
    """Run both graphs once, so that the loop's times hold no compilation."""
    scheduler.set_timesteps(options.steps)
    for timestep in scheduler.timesteps[: options.dense_steps + 1]:
        out = model(noise, timestep=timestep[None], encoder_hidden_states=prompt, return_dict=False)[0]
        scheduler.step(out, timestep, noise, return_dict=False)


def _print_result(result: DemoResult, options: DemoOptions, console: Console) -> None:
    table = Table(title="density and time per step")
    for header in ("step", "density", "", "dense", "sparse"):
        table.add_column(header, justify="left" if header == "" else "right")
    densities = result.report.density_per_step()
    for step, seconds in enumerate(zip(result.dense.step_seconds, result.sparse.step_seconds, strict=True)):
        density = densities.get(step, 1.0)
        bar = "#" * round(24 * density)
        table.add_row(str(step), f"{density:.1%}", bar, f"{seconds[0]:.2f} s", f"{seconds[1]:.2f} s")
    console.print(table)
    later = slice(options.dense_steps, None)
    sparse_steps = sum(result.dense.step_seconds[later]) / sum(result.sparse.step_seconds[later])
    console.print(
        f"dense {result.dense.seconds:.1f} s, sparse {result.sparse.seconds:.1f} s: "
        f"[bold]{result.speedup:.2f}x[/bold] over the whole loop, {sparse_steps:.2f}x in the sparse steps "
        f"(compilation not counted)\nPSNR against dense: [bold]{result.psnr:.1f} dB[/bold]\n"
        f"pictures: {result.picture}"
    )


def _picture(options: DemoOptions, dense: Loop, sparse: Loop) -> Path:
    """Write frames as one PNG: dense above, sparse in the middle, ten times their difference below."""
    from PIL import Image, ImageDraw

    chosen = torch.linspace(0, options.frames - 1, min(5, options.frames)).round().long().tolist()
    low, high = dense.latents.quantile(0.01), dense.latents.quantile(0.99)
    colours = [((loop.latents[0, :3] - low) / (high - low)).clamp(0, 1) for loop in (dense, sparse)]
    rows = {
        "dense": colours[0],
        "sparse": colours[1],
        "10 x difference": ((colours[1] - colours[0]).abs() * 10).clamp(0, 1),
    }

    height, width, gap, margin = (size * 4 for size in (options.height, options.width, 1, 26))
    line = height + gap
    canvas = Image.new("RGB", (margin + len(chosen) * (width + gap), 20 + len(rows) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, video) in enumerate(rows.items()):
        draw.text((4, 20 + row * line + height // 2), label, fill="black")
        for column, frame in enumerate(chosen):
            pixels = (video[:, frame] * 255).byte().permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + column * (width + gap), 20 + row * line))
            if row == 0:
                draw.text((margin + column * (width + gap), 4), f"latent frame {frame}", fill="black")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "frames.png"
    canvas.save(path)
    return path
