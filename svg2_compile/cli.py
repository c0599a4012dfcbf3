"""The command ``svg2``. Every command is thin and imports its own module, so that ``svg2 --help`` is quick."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(
    help="Sparse video attention for diffusion transformers: torch.compile(model, backend='svg2').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
presets_app = typer.Typer(help="Settings for known models.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, compilers and numbers. Exit code 1 if something does not work."""
    from svg2_compile.doctor import diagnose

    diagnosis = diagnose()
    _show(diagnosis, diagnosis.to_dict(), as_json)
    raise typer.Exit(0 if diagnosis.healthy else 1)


@presets_app.command("list")
def presets_list(as_json: AsJson = False) -> None:
    """List all presets with their status and main settings."""
    from svg2_compile.presets import load_presets
    from svg2_compile.presets_view import as_dict, overview

    presets = list(load_presets().values())
    _show(overview(presets), [as_dict(preset) for preset in presets], as_json)


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(help="model, model:variant or model/variant")], as_json: AsJson = False
) -> None:
    """Show every setting of one preset, and where it comes from."""
    from svg2_compile.config import ConfigError
    from svg2_compile.presets import load_preset
    from svg2_compile.presets_view import as_dict, details

    try:
        preset = load_preset(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    _show(details(preset), as_dict(preset), as_json)


def _show(view: Any, data: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        Console().print(view)


if __name__ == "__main__":
    app()
