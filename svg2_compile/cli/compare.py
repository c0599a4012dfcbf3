"""``svg2 compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svg2_compile.cli.arguments import AsJson, Options, chosen_options, fail

__all__ = ["compare"]


def compare(
    prompt: Annotated[str | None, typer.Option(help="What to show; needed with --pipeline.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise that both runs start from.")] = 0,
    size: Annotated[str | None, typer.Option(help="FRAMESxHEIGHTxWIDTH in pixels, such as 16x64x64.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings for a known model (svg2 presets list).")] = None,
    options: Options = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Folder or name of a diffusers pipeline, instead of the shipped small model.")
    ] = None,
    regional: Annotated[bool, typer.Option("--regional", help="Compile one graph for all layers.")] = False,
    maps: Annotated[bool, typer.Option("--maps", help="Look into one attention; also written as PNG.")] = False,
    map_layer: Annotated[str | None, typer.Option(help="Which: path or number among the sparse ones.")] = None,
    map_step: Annotated[int | None, typer.Option(min=0, help="Which denoising step.")] = None,
    map_head: Annotated[int | None, typer.Option(min=0, help="Which head.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate a video dense and sparse; write frames, quality, times and densities as one HTML page."""
    from svg2_compile.compare import command
    from svg2_compile.compare.capture import MapRequest
    from svg2_compile.compare.progress import shown_progress

    chosen = chosen_options(preset, options)
    asked = any(given is not None for given in (map_layer, map_step, map_head))
    request = MapRequest(map_layer, map_step, map_head) if maps or asked else None
    page = output or (None if as_json else command.DEFAULT_PAGE)
    try:
        asked_for = command.CompareRequest(prompt, seed, size, steps, guidance, pipeline, request, regional)
        with shown_progress(Console(stderr=True)) as tell:
            result = command.compare_command(asked_for, chosen, tell)
        if page is not None:
            written = [result.write_html(page)]
            written += [result.write_maps(command.maps_path(page))] if request else []
            typer.echo("written: " + ", ".join(map(str, written)), err=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
