"""The command ``svg2``. Every command is thin and imports its own module, so that ``svg2 --help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
Options = Annotated[
    list[str] | None,
    typer.Option("--set", "--option", help="NAME=VALUE of an svg2 option, such as top_p=0.8; repeatable."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, compilers and numbers. Exit code 1 if something does not work."""
    from svg2_compile.tools.doctor import diagnose

    diagnosis = diagnose()
    _show(diagnosis, diagnosis.to_dict(), as_json)
    raise typer.Exit(0 if diagnosis.healthy else 1)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="What is asked for, in the words of the model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(min=4, help="Pixels, a multiple of 4.")] = None,
    width: Annotated[int | None, typer.Option(min=4, help="Pixels, a multiple of 4.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the pairs to select (default 0.2).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Softmax mass to reach, instead of a density.")] = None,
    inner_backend: Annotated[str | None, typer.Option(help="What compiles the graphs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
) -> None:
    """Make a small video dense and sparse; show decisions, densities, times and PSNR, frames and an animation."""
    given = {name: value for name, value in locals().items() if value is not None}
    from svg2_compile.tools.demo import DemoOptions, run_demo

    try:
        run_demo(DemoOptions(**given), Console())
    except (ImportError, ValueError) as error:
        _fail(error)


@app.command()
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

    chosen = _chosen(preset, options)
    asked = any(given is not None for given in (map_layer, map_step, map_head))
    request = MapRequest(map_layer, map_step, map_head) if maps or asked else None
    page = output or (None if as_json else command.DEFAULT_PAGE)
    try:
        result = command.compare_command(
            command.CompareRequest(prompt, seed, size, steps, guidance, pipeline, request, regional), chosen
        )
        if page is not None:
            written = [result.write_html(page)]
            written += [result.write_maps(command.maps_path(page))] if request else []
            typer.echo("written: " + ", ".join(map(str, written)), err=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        _fail(error)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Import path of a class (diffusers.WanTransformer3DModel) or FILE.pt2")],
    config: Annotated[Path | None, typer.Option(help="JSON file with the arguments of the class.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=SHAPE:DTYPE or NAME=NUMBER, such as fps=24; repeatable.")
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
    as_json: AsJson = False,
) -> None:
    """Show which attentions of a model would become sparse, or what a transformed program does.

    Needs neither weights nor memory for them.
    """
    from svg2_compile.export.archive import is_archive
    from svg2_compile.tools import inspect as loader
    from svg2_compile.tools.example_inputs import VideoShape

    try:
        chosen = _pairs("--set", options)
        if is_archive(Path(model)):
            from svg2_compile.export.commands import inspect_command

            facts = inspect_command(Path(model), graph, site)
            _show(facts, facts.to_dict(), as_json)
            return
        if graph is not None:
            raise ValueError("--graph draws what was rewritten. Valid: a file of svg2 transform.")
        if model.endswith(".pt2"):
            report = loader.inspect_exported(Path(model), chosen)
        else:
            arguments = loader.read_config(config)
            video = VideoShape(batch, frames, height, width, text_tokens)
            given = _pairs("--input", inputs)
            weights = loader.parse_dtype(dtype, "--dtype")
            report = loader.inspect_class(model, arguments, video, given, chosen, weights)
    except ValueError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(report.render(min(Console().width, 100)))


@app.command()
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
        chosen = _chosen(preset, options)
        facts = transform_command(model, output, chosen)
    except (TypeError, ValueError) as error:
        _fail(error)
    _show(facts, facts.to_dict(), as_json)


@app.command()
def package(
    model: Annotated[Path, typer.Argument(help="A file of svg2 transform.")], output: Output, as_json: AsJson = False
) -> None:
    """Compile a transformed program ahead of time with AOTInductor (experimental); svg2_compile.load reads it."""
    from svg2_compile.export.commands import package_command

    try:
        facts = package_command(model, output)
    except (TypeError, ValueError) as error:
        _fail(error)
    _show(facts, facts.to_dict(), as_json)


@app.command()
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
        _fail(error)


@presets_app.command("list")
def presets_list(as_json: AsJson = False) -> None:
    """List all presets with their status and main settings."""
    from svg2_compile.cli.presets import as_dict, overview
    from svg2_compile.settings.presets import load_presets

    presets = list(load_presets().values())
    _show(overview(presets), [as_dict(preset) for preset in presets], as_json)


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(help="model, model:variant or model/variant")], as_json: AsJson = False
) -> None:
    """Show every setting of one preset, and where it comes from."""
    from svg2_compile.cli.presets import as_dict, details
    from svg2_compile.settings.config import ConfigError
    from svg2_compile.settings.presets import load_preset

    try:
        preset = load_preset(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    _show(details(preset), as_dict(preset), as_json)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        pairs[name.strip()] = value.strip()
    return pairs


def _chosen(preset: str | None, options: list[str] | None) -> dict[str, str]:
    """svg2's options as the command line gives them."""
    return _pairs("--set", options) | ({"preset": preset} if preset else {})


def _fail(error: Exception) -> NoReturn:
    """End with the message alone: what went wrong is in what was given, not in the code."""
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(2) from error


def _show(view: Any, data: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        Console().print(view)


if __name__ == "__main__":
    app()
