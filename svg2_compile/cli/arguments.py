"""What the commands share: types of their arguments, how they read options, show results and fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

__all__ = ["AsJson", "Options", "Output", "chosen_options", "fail", "pairs", "show"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", "--option", help="NAME=VALUE of an svg2 option, such as top_p=0.8; repeatable."),
]

Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        pairs[name.strip()] = value.strip()
    return pairs


def chosen_options(preset: str | None, options: list[str] | None) -> dict[str, str]:
    """svg2's options as the command line gives them."""
    return pairs("--set", options) | ({"preset": preset} if preset else {})


def fail(error: Exception) -> NoReturn:
    """End with the message alone: what went wrong is in what was given, not in the code."""
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(2) from error


def show(view: Any, data: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        Console().print(view)
