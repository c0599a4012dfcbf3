"""``svg2 demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svg2_compile.cli.arguments import fail

__all__ = ["demo"]


def demo(
    prompt: Annotated[str | None, typer.Option(help="What is asked for, in the words of the model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(min=4, help="Pixels, a multiple of 4.")] = None,
    width: Annotated[int | None, typer.Option(min=4, help="Pixels, a multiple of 4.")] = None,
    density: Annotated[str | None, typer.Option(help="Share of the pairs, or a schedule such as 0.3..0.05.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Softmax mass to reach, instead of a density.")] = None,
    inner_backend: Annotated[str | None, typer.Option(help="What compiles the graphs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
) -> None:
    """Make a small video dense and sparse; show decisions, densities, times and PSNR, frames and an animation."""
    given = {name: value for name, value in locals().items() if value is not None}
    from svg2_compile.tools.demo import DemoOptions, run_demo

    try:
        run_demo(DemoOptions(**given), Console())
    except (ImportError, ValueError) as error:
        fail(error)
