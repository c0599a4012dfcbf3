"""What is compared: something that generates a video, and what ``enable`` takes to make it sparse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svg2_compile.compare.videos import as_video

__all__ = ["PIPELINE_STEPS", "Subject", "pipeline_subject", "shipped_subject"]

PIPELINE_STEPS = "num_inference_steps"


@dataclass(frozen=True)
class Subject:
    """One generation that can be repeated.

    Attributes:
        name: of the model, for the report.
        target: a pipeline or module, as ``enable`` takes it.
        scheduler: the scheduler that drives it; it tells steps and their times.
        generate: runs all steps and returns the video [C, F, H, W], always from the same noise; with a number it only
            runs as many steps, to warm up, and what it returns is not looked at. It calls ``target``.
        facts: what was asked for, to be shown: prompt, seed, size, steps ...
        latent: the video is one of latents, in no known range.
        option_defaults: svg2 options that this subject needs unless they are given.
        warm_up_steps: the fewest that run everything; some schedulers make no schedule of a single one.
    """

    name: str
    target: Any
    scheduler: Any
    generate: Callable[[int | None], Tensor]
    facts: dict[str, Any]
    latent: bool = False
    option_defaults: dict[str, Any] = field(default_factory=dict)
    warm_up_steps: int = 2


def pipeline_subject(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Subject:
    """A call ``pipe(**arguments)`` of a diffusers pipeline.

    A generator with ``seed`` is added. Without an ``output_type``, frames are decoded where there is an autoencoder.

    Raises:
        TypeError: ``pipe`` is no pipeline with a scheduler.
        ValueError: an argument that the pipeline does not take.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not callable(pipe) or scheduler is None:
        raise TypeError(f"pipe: expected a diffusers pipeline with a scheduler, got {type(pipe).__name__}")
    taken = inspect.signature(pipe.__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    unknown = sorted(set(arguments) - set(taken))
    if unknown and not open_ended:
        raise ValueError(f"{unknown[0]}: {type(pipe).__name__} takes no such argument. Valid: {', '.join(taken)}.")
    decoded = "np" if getattr(pipe, "vae", None) is not None else "latent"
    output_type = arguments.get("output_type", decoded)
    channels = _latent_channels(pipe)

    def generate(steps: int | None) -> Tensor:
        call = {**arguments, "generator": torch.Generator().manual_seed(seed), "output_type": output_type}
        if steps is not None:
            call = {name: value for name, value in call.items() if name not in ("sigmas", "timesteps")}
            # Nobody looks at this video, and some pipelines' latents have no axes of a video.
            pipe(**call | {PIPELINE_STEPS: steps, "output_type": "latent"})
            return torch.empty(0)
        return as_video(pipe(**call), call["output_type"], channels)

    facts = {"seed": seed} | {name: _shown(value) for name, value in arguments.items()}
    return Subject(type(pipe).__name__, pipe, scheduler, generate, facts, latent=output_type == "latent")


def _latent_channels(pipe: Any) -> int | None:
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    channels = getattr(config, "in_channels", None)
    return channels if isinstance(channels, int) else None


def _shown(value: Any) -> Any:
    """An argument as the report shows it: tensors and pictures by their sizes."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 8:
        return [_shown(item) for item in value]
    return type(value).__name__


def shipped_subject(
    prompt: str, seed: int, size: tuple[int, int, int], steps: int, guidance: float, device: str = "cpu"
) -> Subject:
    """A video of the small trained model that comes with the package.

    Args:
        prompt: in the words of ``svg2_compile.minidit.prompts``.
        size: frames, height and width in pixels; height and width are multiples of 4.
        steps, guidance: of the sampling loop.

    Raises:
        ImportError: diffusers is missing.
        ValueError: the prompt, the size or the steps are not valid.
    """
    from svg2_compile.minidit.prompts import parse_prompt

    words = parse_prompt(prompt)
    if min(size) < 1 or size[1] % 4 or size[2] % 4:
        raise ValueError(f"size={'x'.join(map(str, size))}: height and width are multiples of 4, frames at least 1")
    if steps < 2:
        raise ValueError(f"steps={steps}: a comparison needs at least 2 steps")
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError("the shipped model needs diffusers: svg2-compile[diffusers]") from error
    from svg2_compile.minidit.model import VideoSize, load_model, make_scheduler, sample_videos

    video_size = VideoSize(*size)
    model = load_model(device=device)
    scheduler = make_scheduler(video_size.tokens)

    def generate(given: int | None) -> Tensor:
        count = given or steps
        return sample_videos(model, [words], [seed], video_size, count, guidance, scheduler)[0]

    facts = {
        "prompt": str(words),
        "seed": seed,
        "size": "{} frames of {} x {} pixels".format(*size),
        "tokens": video_size.tokens,
        "steps": steps,
        "guidance": guidance,
    }
    # The cost model's crossover is about speed; what this model is for is quality.
    defaults = {"min_tokens": 0}
    return Subject(
        "svg2's small trained model", model, scheduler, generate, facts, option_defaults=defaults, warm_up_steps=1
    )
