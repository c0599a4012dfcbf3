"""What ``svg2 compare`` does: arguments of the shell as a subject, compared, and the page written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg2_compile.compare.capture import MapRequest
from svg2_compile.compare.comparison import Comparison
from svg2_compile.compare.paired import compare_subject
from svg2_compile.compare.progress import Tell
from svg2_compile.compare.subjects import PIPELINE_STEPS, Subject, pipeline_subject, shipped_subject
from svg2_compile.settings.config import Svg2Config

__all__ = ["DEFAULT_PAGE", "CompareRequest", "compare_command", "maps_path", "parse_size"]

DEFAULT_PAGE = Path("svg2-compare.html")
DEFAULT_PROMPT = "red brick disc right, blue dots star up, background grass, camera left"
DEFAULT_SIZE = (16, 64, 64)
DEFAULT_STEPS = 30
DEFAULT_GUIDANCE = 3.0


@dataclass(frozen=True)
class CompareRequest:
    """The arguments of the command; None where one was not given."""

    prompt: str | None = None
    seed: int = 0
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    pipeline: str | None = None
    maps: MapRequest | None = None
    regional: bool = False


def compare_command(request: CompareRequest, options: Mapping[str, Any], tell: Tell | None = None) -> Comparison:
    """Run the comparison.

    Raises:
        ImportError: an extra is missing.
        ValueError, TypeError: an argument is not valid; the message names it.
    """
    Svg2Config.from_options(options)  # before anything is loaded
    size = None if request.size is None else parse_size(request.size)
    subject = _shipped(request, size) if request.pipeline is None else _pipeline(request, size)
    return compare_subject(subject, request.maps, regional=request.regional, tell=tell, **options)


def parse_size(text: str) -> tuple[int, int, int]:
    """ "16x64x64" as (frames, height, width).

    Raises:
        ValueError: it is not three positive numbers.
    """
    match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", text)
    numbers = tuple(int(part) for part in match.groups()) if match else (0, 0, 0)
    if min(numbers) < 1:
        raise ValueError(f"--size {text!r}: expected FRAMESxHEIGHTxWIDTH in pixels, such as 16x64x64")
    return numbers[0], numbers[1], numbers[2]


def maps_path(page: Path) -> Path:
    """Where the attention maps of a page go: "report.html" and "report-maps.png"."""
    return page.with_name(f"{page.stem}-maps.png")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _shipped(request: CompareRequest, size: tuple[int, int, int] | None) -> Subject:
    return shipped_subject(
        DEFAULT_PROMPT if request.prompt is None else request.prompt,
        request.seed,
        size or DEFAULT_SIZE,
        DEFAULT_STEPS if request.steps is None else request.steps,
        DEFAULT_GUIDANCE if request.guidance is None else request.guidance,
        _device(),
    )


def _pipeline(request: CompareRequest, size: tuple[int, int, int] | None) -> Subject:
    if request.prompt is None:
        raise ValueError("--prompt is missing: --pipeline needs one")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("--pipeline needs diffusers: svg2-compile[diffusers]") from error
    device = _device()
    dtype = {"torch_dtype": torch.bfloat16} if device == "cuda" else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(request.pipeline, **dtype).to(device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pipeline {request.pipeline!r} cannot be loaded: {error}. Valid: a folder or name for "
            "diffusers.DiffusionPipeline.from_pretrained."
        ) from error
    arguments: dict[str, Any] = {"prompt": request.prompt}
    if size is not None:
        arguments |= dict(zip(("num_frames", "height", "width"), size, strict=True))
    if request.steps is not None:
        arguments[PIPELINE_STEPS] = request.steps
    if request.guidance is not None:
        arguments["guidance_scale"] = request.guidance
    return pipeline_subject(pipe, arguments, request.seed)
