"""How fast a file runs: dense and sparse steps of the small trained model, against the torch.compile door."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import svg2_compile
from bench.common import measure, require_close
from bench.minidit.sample import PROMPTS
from svg2_compile.minidit.model import VideoSize, initial_noise, load_model, with_coordinates
from svg2_compile.minidit.prompts import encode_prompt

REPEATS = 5
SETTINGS: dict[str, Any] = {
    "dense_steps": 1,
    "dense_layers": 0,
    "min_tokens": 0,
    "init_iters": 10,
    "inner_backend": "inductor",
}
# One dense step, then sparse ones; every measured video has both.
TIMESTEPS = (900.0, 700.0, 500.0)
# Two orders of summation may let a tie in k-means fall differently: a few tokens then attend to other blocks.
SAME_SELECTION = 2e-2

Call = Callable[[float], torch.Tensor]


def row(size: VideoSize, folder: Path, with_package: bool) -> dict[str, Any]:
    """Median times of one step by every door: torch.compile, the loaded file and, if wanted, the package."""
    model = load_model()
    inputs = {
        "hidden_states": with_coordinates(initial_noise(0, size)),
        "encoder_hidden_states": encode_prompt(PROMPTS[0])[None],
        "return_dict": False,
    }
    with torch.no_grad():
        exported = torch.export.export(model, (), {**inputs, "timestep": torch.tensor([TIMESTEPS[0]])})
        program = svg2_compile.transform(exported, **SETTINGS)
        svg2_compile.save(program, folder / "saved.pt2")
        compiled = torch.compile(model, backend="svg2", options=SETTINGS)
        doors = {
            "torch_compile": _call(compiled, inputs),
            "file": _call(svg2_compile.load(folder / "saved.pt2"), inputs),
        }
        if with_package:
            svg2_compile.package(program, folder / "packaged.pt2")
            doors["package"] = _call(svg2_compile.load(folder / "packaged.pt2"), inputs)
        videos = {name: [call(timestep) for timestep in TIMESTEPS] for name, call in doors.items()}
        errors = [
            require_close(name, mine, theirs, SAME_SELECTION)
            for name, outputs in videos.items()
            for mine, theirs in zip(outputs, videos["torch_compile"], strict=True)
        ]
        times = {step: _step_times(doors, svg2_compile.reset, step) for step in ("dense", "sparse")}
    return {
        "part": "speed",
        "tokens": size.tokens,
        "layers": len(model.blocks),
        "inner_backend": SETTINGS["inner_backend"],
        "mean_density": round(svg2_compile.report(model).mean_density or 0.0, 4),
        "relative_error": float(f"{max(errors):.1e}"),
        **{f"{step}_step": times[step] for step in times},
    }


def _call(run: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    def call(timestep: float) -> torch.Tensor:
        output: torch.Tensor = run(**inputs, timestep=torch.tensor([timestep]))[0]
        return output

    return call


def _step_times(doors: dict[str, Call], reset: Callable[[], None], step: str) -> dict[str, Any]:
    """Times of one kind of step. A dense step is the first of a video; sparse ones follow each other in one video."""
    functions: dict[str, Callable[[], object]] = {}
    for name, call in doors.items():
        if step == "dense":
            functions[name] = functools.partial(_first_step, call, reset)
        else:
            for timestep in TIMESTEPS[:2]:
                call(timestep)
            functions[name] = functools.partial(_next_step, call, itertools.count(1))
    return {name: timing.to_json() for name, timing in measure(functions, REPEATS).items()}


def _first_step(call: Call, reset: Callable[[], None]) -> None:
    reset()
    call(TIMESTEPS[0])


def _next_step(call: Call, steps: Iterator[int]) -> None:
    call(TIMESTEPS[1] - 0.5 * next(steps))
