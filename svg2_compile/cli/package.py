"""``svg2 package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svg2_compile.cli.arguments import AsJson, Output, fail, show

__all__ = ["package"]


def package(
    model: Annotated[Path, typer.Argument(help="A file of svg2 transform.")], output: Output, as_json: AsJson = False
) -> None:
    """Compile a transformed program ahead of time with AOTInductor (experimental); svg2_compile.load reads it."""
    from svg2_compile.export.commands import package_command

    try:
        facts = package_command(model, output)
    except (TypeError, ValueError) as error:
        fail(error)
    show(facts, facts.to_dict(), as_json)
