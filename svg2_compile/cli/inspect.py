"""``svg2 inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svg2_compile.cli.arguments import AsJson, Options, chosen_options, fail, pairs, show

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="Import path of a class (diffusers.WanTransformer3DModel), FILE.pt2, or FILE.py:FUNCTION"),
    ],
    config: Annotated[Path | None, typer.Option(help="JSON file with the arguments of the class.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=SHAPE:DTYPE or NAME=NUMBER, such as fps=24; repeatable.")
    ] = None,
    call: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION that returns the arguments of a call, for a MODEL of that form."),
    ] = None,
    options: Options = None,
    graph: Annotated[
        Path | None, typer.Option(help="FILE.svg or FILE.dot: draw a rewritten attention of a transformed program.")
    ] = None,
    site: Annotated[int, typer.Option(min=0, help="Which of the sparse attentions to draw.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Videos in one call.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the latent video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height of the latent video.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the latent video.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and inputs.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="To predict speed for: cpu, cuda, cuda:sm_90 ...; default: the device here.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Settings for a known model (svg2 presets list).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which attentions of a model would become sparse, or what a transformed program does.

    Needs neither weights nor memory for them.
    """
    from svg2_compile.export.archive import is_archive
    from svg2_compile.tools import inspect as loader
    from svg2_compile.tools.example_inputs import VideoShape
    from svg2_compile.tools.own_model import inspect_own_model

    try:
        chosen = chosen_options(preset, options)
        if is_archive(Path(model)):
            from svg2_compile.export.commands import inspect_command

            facts = inspect_command(Path(model), graph, site)
            show(facts, facts.to_dict(), as_json)
            return
        if graph is not None:
            raise ValueError("--graph draws what was rewritten. Valid: a file of svg2 transform.")
        is_file = ".py:" in model
        if is_file != (call is not None):
            raise ValueError("MODEL and --call go together: --call FILE.py:FUNCTION with a MODEL FILE.py:FUNCTION.")
        if is_file:
            report = inspect_own_model(model, str(call), chosen, device)
        elif model.endswith(".pt2"):
            report = loader.inspect_exported(Path(model), chosen, device)
        else:
            arguments = loader.read_config(config)
            video = VideoShape(batch, frames, height, width, text_tokens)
            given = pairs("--input", inputs)
            weights = loader.parse_dtype(dtype, "--dtype")
            report = loader.inspect_class(model, arguments, video, given, chosen, weights, device)
    except ValueError as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(report.render(min(Console().width, 100)))
