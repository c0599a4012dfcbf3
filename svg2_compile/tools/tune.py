"""``svg2 tune``: measure the kernels' configurations and the figures of the cost model here, keep and share them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from svg2_compile.kernels.autotune.search import Outcome, default_workloads, describe, tune
from svg2_compile.kernels.autotune.search import Progress as Step
from svg2_compile.kernels.autotune.workloads import Workload
from svg2_compile.kernels.tuning import tables as tuning_tables
from svg2_compile.kernels.tuning.lookup import device_name, forget_tables
from svg2_compile.passes.cost_model import crossover_tokens
from svg2_compile.passes.device_profile import profile_for
from svg2_compile.settings.presets import load_preset
from svg2_compile.tools.calibrate import CalibrationSize, measure_profile

__all__ = ["DEFAULT_PRESET", "export_table", "import_table", "parse_budget", "run_tune", "workloads_for"]

DEFAULT_PRESET = "wan2.1-1.3b-480p"
# A processor needs minutes for what a GPU does in milliseconds: its chunk sizes are found on smaller attentions.
CPU_TOKENS, CPU_HEADS = 8192, 2
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """Seconds of "120", "120s", "2m", "2min" or "1h". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match.group(2) not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(f"--budget is {text!r}; valid: a positive number of seconds, or with a unit: 120s, 2m, 1h")
    return float(match.group(1)) * _UNITS[match.group(2)]


def workloads_for(preset: str, device: torch.device) -> list[Workload]:
    """What to tune for a preset on ``device``. Raises ConfigError, a ValueError, for an unknown preset."""
    shape = load_preset(preset).shape
    if device.type == "cuda":
        return default_workloads(device, torch.bfloat16, shape.head_dim, shape.tokens, shape.heads)
    tokens, heads = min(shape.tokens, CPU_TOKENS), min(shape.heads, CPU_HEADS)
    return default_workloads(device, torch.float32, shape.head_dim, tokens, heads)


def run_tune(preset: str, budget_s: float, console: Console) -> list[Outcome]:
    """Tune for one preset with a progress bar, and show what came of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workloads = workloads_for(preset, device)
    console.print(f"Tuning for {preset} on {device_name(device)}, at most {budget_s:.0f} s.")
    if device.type == "cpu":
        console.print(
            "There is no CUDA device here: the chunk sizes of the ATen calls are tuned, which run where there is no "
            f"native code, on {workloads[0].num_heads} heads of {workloads[0].num_tokens:,} tokens. Run this on the "
            "GPU to tune its kernels."
        )
    outcomes = _search(workloads, device, budget_s, console)
    console.print(outcome_table(outcomes))
    _calibrate(device, console)
    folder = tuning_tables.cache_dir()
    console.print(f"Kept in {folder}; every later run on this device uses it. Share it: svg2 tune --export FILE")
    return outcomes


def _calibrate(device: torch.device, console: Console) -> None:
    """Measure what the cost model multiplies by, keep it, and say from how many tokens on sparse attention now pays."""
    size = CalibrationSize.of(device)
    before = crossover_tokens(size.cost(), profile_for(device))
    with torch.inference_mode():
        profile = measure_profile(device, size)
    name = device_name(device)
    tuning_tables.merge(tuning_tables.Table(name, tuning_tables.engine_of(name), profile=profile))
    forget_tables()
    after = crossover_tokens(size.cost(), profile_for(device))
    dtype = str(size.dtype).removeprefix("torch.")
    console.print(
        f"Cost model of min_tokens='auto', measured here: dense {profile['dense_flops'] / 1e12:.2f} TFLOP/s, sparse "
        f"{profile['sparse_flops'] / 1e12:.2f}. The default settings gain from {_tokens(after)} on ({size.num_heads} "
        f"heads of {size.head_dim}, {dtype}); before: {_tokens(before)}."
    )


def _tokens(count: int | None) -> str:
    return "no number of tokens" if count is None else f"{count:,} tokens"


def _search(workloads: Sequence[Workload], device: torch.device, budget_s: float, console: Console) -> list[Outcome]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        tasks: dict[Workload, Any] = {}

        def tell(step: Step) -> None:
            if step.workload not in tasks:
                tasks[step.workload] = progress.add_task(_title(step.workload), total=step.total, note="")
            note = f"best {step.best_ms:.2f} ms" + (f"; out: {step.note}" if step.note not in ("", "known") else "")
            progress.update(tasks[step.workload], completed=step.done, note=note)

        return tune(workloads, device, budget_s=budget_s, tell=tell)


def _title(workload: Workload) -> str:
    dtype = str(workload.dtype).removeprefix("torch.")
    size = f"{workload.num_heads} x {workload.num_tokens:,} x {workload.head_dim}"
    return f"{workload.kernel}, {size} {dtype}, {workload.density:.0%}"


def outcome_table(outcomes: Sequence[Outcome]) -> RichTable:
    """Before and after, for every workload."""
    table = RichTable(title="before and after", title_justify="left")
    for header in ("kernel", "default ms", "best ms", "speed-up", "tried", "configuration"):
        table.add_column(header, overflow="fold")
    for outcome in outcomes:
        found = outcome.measurement
        tried = f"{len(found.trials)}" + ("" if found.complete else ", not all")
        times = (f"{found.default_ms:.2f}", f"{found.best_ms:.2f}", f"{outcome.speedup:.2f}x")
        table.add_row(_title(outcome.workload), *times, tried, describe(found.config))
    return table


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """For --json."""
    return {**asdict(outcome.workload.key), **asdict(outcome.measurement), "speedup": outcome.speedup}


def export_table(path: Path) -> tuning_tables.Table:
    """Write this device's own table to ``path``. Raises ValueError where nothing was tuned yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = tuning_tables.load_table(device_name(device), tuning_tables.cache_dir())
    if table is None:
        raise ValueError(f"nothing to export: no tuning of {device_name(device)} yet; run `svg2 tune` first")
    tuning_tables.write_table(path, table)
    return table


def import_table(path: Path) -> tuning_tables.Table:
    """Merge a file written by --export into the user's tables. Raises ValueError for a file that is no table."""
    try:
        table = tuning_tables.read_table(path)
    except OSError as problem:
        raise ValueError(f"--import: {path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise ValueError(f"--import: {path} is no tuning table: {problem}") from None
    tuning_tables.merge(table)
    forget_tables()
    return table
