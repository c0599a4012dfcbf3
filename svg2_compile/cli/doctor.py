"""``svg2 doctor``."""

from __future__ import annotations

import typer

from svg2_compile.cli.arguments import AsJson, show

__all__ = ["doctor"]


def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, compilers and numbers. Exit code 1 if something does not work."""
    from svg2_compile.tools.doctor import diagnose

    diagnosis = diagnose()
    show(diagnosis, diagnosis.to_dict(), as_json)
    raise typer.Exit(0 if diagnosis.healthy else 1)
