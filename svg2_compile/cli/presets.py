"""``svg2 presets list`` and ``svg2 presets show``: as tables for a terminal, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from svg2_compile.cli.arguments import AsJson, show
from svg2_compile.settings.config import ConfigError, Svg2Config
from svg2_compile.settings.presets import VARIANTS, Preset, load_preset, load_presets

__all__ = ["as_dict", "details", "overview", "presets_app"]

presets_app = typer.Typer(help="Settings for known models.", no_args_is_help=True)


@presets_app.command("list")
def presets_list(as_json: AsJson = False) -> None:
    """List all presets with their status and main settings."""
    presets = list(load_presets().values())
    show(overview(presets), [as_dict(preset) for preset in presets], as_json)


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(help="model, model:variant or model/variant")], as_json: AsJson = False
) -> None:
    """Show every setting of one preset, and where it comes from."""
    try:
        preset = load_preset(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    show(details(preset), as_dict(preset), as_json)


def as_dict(preset: Preset) -> dict[str, Any]:
    """A preset with all settings that it leads to, defaults included."""
    config = Svg2Config.from_options({"preset": preset.name})
    return {
        "name": preset.name,
        "description": preset.description,
        "status": preset.status,
        "source": preset.source,
        "settings": config.to_dict(),
    }


def overview(presets: Sequence[Preset]) -> Table:
    """One row for each preset, in at most 80 columns."""
    caption = "dense: steps and layers at the start that stay dense; skipped: what becomes of clusters not selected"
    table = Table(
        title="presets",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("name", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for header in ("top_p", "clusters", "dense", "skipped"):
        table.add_column(header, justify="right", no_wrap=True)
    for preset in presets:
        config = Svg2Config.from_options({"preset": preset.name})
        table.add_row(
            preset.name,
            _status(preset),
            f"{config.selection()[0]:.2f}",
            _clusters(config),
            f"{_amount(config.dense_steps)} {_amount(config.dense_layers)}",
            {"none": "-", "centroid": "centroid", "first_order": "1st order"}[config.compensation],
            end_section=preset.variant == VARIANTS[-1],
        )
    return table


def details(preset: Preset) -> Group:
    """All settings of one preset; those that the preset sets are marked."""
    config = Svg2Config.from_options({"preset": preset.name})
    table = Table(title=preset.name, title_justify="left")
    for header in ("option", "value", "set by"):
        table.add_column(header)
    for name, value in config.to_dict().items():
        if name != "preset":
            table.add_row(name, str(value), "preset" if name in preset.settings else "default")
    lines = [
        Text(preset.description),
        Text.assemble("status: ", _status(preset)),
        Text(f"source: {preset.source}"),
        Text(f'use:    options={{"preset": "{preset.name}"}}'),
    ]
    return Group(table, *lines)


def _status(preset: Preset) -> Text:
    return Text(preset.status, "green" if preset.status == "published" else "yellow")


def _clusters(config: Svg2Config) -> str:
    if config.num_q_clusters is None and config.num_k_clusters is None:
        return "from N"
    return f"{config.num_q_clusters or 'auto'}/{config.num_k_clusters or 'auto'}"


def _amount(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value * 100:g}%"
