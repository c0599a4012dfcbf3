"""``svg2 tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from svg2_compile.cli.arguments import AsJson, fail

__all__ = ["tune"]


def tune(
    preset: Annotated[str | None, typer.Option(help="Model whose attention is tuned; see `svg2 presets list`.")] = None,
    budget: Annotated[str, typer.Option(help="Time to spend: 120s, 2m, 1h.")] = "120s",
    export: Annotated[Path | None, typer.Option(help="Write this device's results to FILE; tunes nothing.")] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Take over results from FILE; tunes nothing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest kernel configurations on this machine. Resumes where an earlier search stopped."""
    from svg2_compile.tools import tune as tune_command

    if sum(given is not None for given in (preset, export, import_)) > 1:
        raise typer.BadParameter("--preset, --export and --import exclude each other", param_hint="OPTIONS")
    try:
        if export is not None:
            table = tune_command.export_table(export)
            typer.echo(f"{len(table.measurements)} results of {table.device} written to {export}")
        elif import_ is not None:
            table = tune_command.import_table(import_)
            typer.echo(f"{len(table.measurements)} results of {table.device} taken over")
        else:
            console = Console(stderr=as_json)
            seconds = tune_command.parse_budget(budget)
            outcomes = tune_command.run_tune(preset or tune_command.DEFAULT_PRESET, seconds, console)
            if as_json:
                typer.echo(json.dumps([tune_command.as_dict(outcome) for outcome in outcomes], indent=2))
    except (OSError, ValueError) as error:
        fail(error)
