"""``svg2 demo``: the small trained model makes a video, dense and sparse side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from svg2_compile.compare.comparison import Comparison
from svg2_compile.compare.pair import decibel
from svg2_compile.compare.paired import compare_subject
from svg2_compile.compare.progress import shown_progress
from svg2_compile.compare.subjects import shipped_subject

__all__ = ["DemoOptions", "DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs: a prompt in the words of the model, pixels of the video, steps, and svg2's settings.

    One of density (a fraction, or a schedule such as "0.3..0.05") and top_p, or neither for svg2's own default.
    """

    prompt: str = "cyan stripes square down, orange dots disc up, red checks star right, background fur, camera up"
    seed: int = 0
    frames: int = 32
    height: int = 64
    width: int = 64
    steps: int = 8
    guidance: float = 3.0
    dense_steps: float = 0.2
    density: float | str | None = None
    top_p: float | None = None
    inner_backend: str = "inductor"
    out: Path = Path("svg2-demo")

    @property
    def size(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def selection(self) -> dict[str, Any]:
        """What is selected, as svg2's options."""
        if self.density is not None and self.top_p is not None:
            raise ValueError(f"density={self.density} and top_p={self.top_p}: each says what is selected. Give one.")
        if self.top_p is not None:
            return {"top_p": self.top_p}
        return {} if self.density is None else {"density": self.density}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where its pictures are."""

    comparison: Comparison
    picture: Path
    animation: Path
    page: Path


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Run the demo, print what it finds, and write a sheet of frames, an animation and the page of ``svg2 compare``.

    Raises:
        ImportError: diffusers, Pillow or scikit-image is missing; the message names the extra to install.
        ValueError: the prompt, the size, the steps or a setting is not valid.
    """
    selection = options.selection
    subject = shipped_subject(options.prompt, options.seed, options.size, options.steps, options.guidance)
    console.print(
        f'[bold]svg2 demo[/bold]: "{options.prompt}"\n'
        f"diffusers {type(subject.target).__name__}, small, trained on synthetic video; "
        f"{subject.facts['tokens']} video tokens, {options.steps} steps with guidance\n"
    )
    with shown_progress(console) as tell:
        comparison = compare_subject(
            subject,
            regional=True,  # one block is compiled in the stead of eight
            tell=tell,
            dense_steps=options.dense_steps,
            inner_backend=options.inner_backend,
            **selection,
        )
    result = _written(options, comparison)
    console.print(comparison.report.table())
    console.print(_steps_table(comparison))
    _print_result(result, console)
    return result


def _written(options: DemoOptions, comparison: Comparison) -> DemoResult:
    from svg2_compile.minidit.pictures import contact_sheet, write_gif

    dense, sparse = comparison.dense.video, comparison.sparse.video
    difference = (5 * (sparse - dense).abs()).clamp(max=2) - 1
    videos, labels = torch.stack([dense, sparse, difference]), ("dense", "sparse", "5 x difference")
    options.out.mkdir(parents=True, exist_ok=True)
    picture, animation = options.out / "frames.png", options.out / "video.gif"
    contact_sheet(videos, columns=6, labels=labels).save(picture)
    write_gif(videos, animation, gap=4, labels=labels)
    return DemoResult(comparison, picture, animation, comparison.write_html(options.out / "report.html"))


def _steps_table(comparison: Comparison) -> Table:
    table = Table(title="density and time per step")
    for header in ("step", "density", "", "dense", "sparse"):
        table.add_column(header, justify="left" if header == "" else "right")
    report = comparison.report.density_per_step()
    times = zip(comparison.dense.step_seconds, comparison.sparse.step_seconds, strict=True)
    for step, (dense_s, sparse_s) in enumerate(times):
        density = report.get(step, 1.0)
        table.add_row(str(step), f"{density:.1%}", "#" * round(24 * density), f"{dense_s:.2f} s", f"{sparse_s:.2f} s")
    return table


def _print_result(result: DemoResult, console: Console) -> None:
    pair = result.comparison
    later = pair.speedup_of_sparse_steps
    in_sparse_steps = "" if later is None else f", {later:.2f}x in the sparse steps"
    console.print(
        f"dense {pair.dense.seconds:.1f} s, sparse {pair.sparse.seconds:.1f} s: "
        f"[bold]{pair.speedup:.2f}x[/bold] over the whole loop{in_sparse_steps} (compilation not counted)\n"
        f"PSNR against dense: [bold]{decibel(pair.psnr)}[/bold]\n"
        f"frames: {result.picture}\nanimation: {result.animation}\npage: {result.page}"
    )
