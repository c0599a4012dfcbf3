"""The command ``svg2``: one file a command. Every command imports what it runs itself, so that help is quick."""

from __future__ import annotations

import typer

from svg2_compile.cli.compare import compare
from svg2_compile.cli.demo import demo
from svg2_compile.cli.doctor import doctor
from svg2_compile.cli.inspect import inspect
from svg2_compile.cli.package import package
from svg2_compile.cli.presets import presets_app
from svg2_compile.cli.transform import transform
from svg2_compile.cli.tune import tune

__all__ = ["app"]

app = typer.Typer(
    help="Sparse video attention for diffusion transformers: torch.compile(model, backend='svg2').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(presets_app, name="presets")
for command in (doctor, demo, compare, inspect, transform, package, tune):
    app.command()(command)
