"""``svg2 transform``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svg2_compile.cli.arguments import AsJson, Options, Output, chosen_options, fail, show

__all__ = ["transform"]


def transform(
    model: Annotated[Path, typer.Argument(help="A file of torch.export.save, which may unpickle: one that you trust.")],
    output: Output,
    preset: Annotated[str | None, typer.Option(help="Settings for a known model (svg2 presets list).")] = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite an exported program; the result is loaded with svg2_compile.load."""
    from svg2_compile.export.commands import transform_command

    try:
        chosen = chosen_options(preset, options)
        facts = transform_command(model, output, chosen)
    except (TypeError, ValueError) as error:
        fail(error)
    show(facts, facts.to_dict(), as_json)
