"""Finds the fastest configuration of a kernel on this device: prune by resources, check, time, remember.

Every candidate must give the default configuration's result before it is timed. On a GPU those that cannot work (shared
memory, spills in the inner loop, serialised tensor-core instructions) are sorted out by compiling alone. What was tried
is written down after every candidate, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svg2_compile.kernels.autotune.space import CPU_KERNELS, GPU_KERNELS, candidates
from svg2_compile.kernels.autotune.timing import median_ms
from svg2_compile.kernels.autotune.workloads import HEAD_KERNEL, Workload
from svg2_compile.kernels.dispatch import use_implementation
from svg2_compile.kernels.tuning.defaults import capability_of, default_config
from svg2_compile.kernels.tuning.lookup import device_name, forget_tables, override
from svg2_compile.kernels.tuning.tables import Measurement, Table, cache_dir, engine_of, load_table, merge

if TYPE_CHECKING:
    from svg2_compile.kernels.triton.rehearsal import Launch

__all__ = ["Outcome", "Progress", "default_workloads", "rehearsed_launch", "tune"]

# How far results of two configurations may lie apart, relative to the largest: sums are taken in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}

Config = Mapping[str, int]


@dataclass(frozen=True)
class Progress:
    """Told after every candidate: done of total, the best time so far, and why the candidate was left out."""

    workload: Workload
    done: int
    total: int
    best_ms: float
    note: str


@dataclass(frozen=True)
class Outcome:
    """What the search for one workload found. default_ms, best_ms: medians; complete: the whole space was looked at."""

    workload: Workload
    measurement: Measurement

    @property
    def speedup(self) -> float:
        return self.measurement.default_ms / self.measurement.best_ms


def default_workloads(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int, num_heads: int
) -> list[Workload]:
    """The kernels that run on ``device``, each for this shape; attention at the densities of SVG2 and SVG2-Turbo."""
    kernels = GPU_KERNELS if device.type == "cuda" else CPU_KERNELS
    workloads = []
    for kernel in kernels:
        densities = (0.25, 0.10) if kernel.endswith("attention") else (0.25,)
        workloads += [Workload(kernel, dtype, head_dim, num_tokens, num_heads, density) for density in densities]
    return workloads


def tune(
    workloads: Sequence[Workload],
    device: torch.device,
    *,
    budget_s: float,
    folder: Path | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> list[Outcome]:
    """Search for every workload in turn until the time is up; the results are in the user's table at once.

    Each workload gets an equal share of what is left of ``budget_s`` seconds, and its default configuration is timed
    even where that share is used up. folder: of the table, the cache directory if None. Raises RuntimeError where the
    default configuration itself gives no finite result.
    """
    deadline = time.monotonic() + budget_s
    outcomes = []
    for index, workload in enumerate(workloads):
        left = max(deadline - time.monotonic(), 0.0)
        share = left / (len(workloads) - index)
        # Native code has no chunk sizes: those of the CPU are of the ATen calls.
        with use_implementation("cpu") if workload.kernel in CPU_KERNELS else nullcontext():
            outcomes.append(_search(workload, device, share, folder, tell))
    forget_tables()
    return outcomes


def describe(config: Config) -> str:
    """The name of a configuration in a table: "BLOCK_M=128 BLOCK_N=64 ..."."""
    return " ".join(f"{name}={value}" for name, value in sorted(config.items()))


def _search(
    workload: Workload, device: torch.device, seconds: float, folder: Path | None, tell: Callable[[Progress], None]
) -> Outcome:
    name = device_name(device)
    deadline = time.monotonic() + seconds
    default = dict(default_config(workload.kernel, device, workload.key.dtype, workload.key.head_dim))
    known = _known_trials(workload, name, folder)
    call = workload.call(device)
    expected = _result(call, workload, default)
    if not bool(expected.isfinite().all()):
        raise RuntimeError(f"{workload.kernel} with its default configuration gives a result that is not finite")
    default_ms = _time(call, workload, default, device)
    trials: dict[str, float | None] = {**known, describe(default): default_ms}
    configs = {describe(config): config for config in (default, *candidates(workload.kernel))}
    measurement = _measured(configs, trials, default_ms)
    for label in _by_distance(configs, default):
        if label not in trials:
            if time.monotonic() >= deadline:
                break
            trials[label], note = _try(call, workload, configs[label], expected, device)
        else:
            note = "known" if label in known else ""
        measurement = _measured(configs, trials, default_ms)
        merge(Table(name, engine_of(name), {workload.key: measurement}), folder)
        done = sum(label in trials for label in configs)
        tell(Progress(workload, done, len(configs), measurement.best_ms, note))
    return Outcome(workload, measurement)


def _known_trials(workload: Workload, name: str, folder: Path | None) -> dict[str, float | None]:
    """What an earlier, interrupted search for the same key has tried; nothing where that search was complete."""
    table = load_table(name, folder or cache_dir())
    found = table.measurements.get(workload.key) if table is not None else None
    return dict(found.trials) if found is not None and not found.complete else {}


def _measured(configs: Mapping[str, Config], trials: Mapping[str, float | None], default_ms: float) -> Measurement:
    times = {label: ms for label, ms in trials.items() if ms is not None and label in configs}
    best = min(times, key=lambda label: times[label])
    return Measurement(dict(configs[best]), times[best], default_ms, dict(trials), all(c in trials for c in configs))


def _by_distance(configs: Mapping[str, Config], default: Config) -> list[str]:
    """Labels, the default's neighbours first: a short search should be a good one."""
    return sorted(configs, key=lambda label: sum(configs[label][name] != default[name] for name in default))


def _try(
    call: Callable[[], Tensor], workload: Workload, config: Config, expected: Tensor, device: torch.device
) -> tuple[float | None, str]:
    """The time of a configuration, or None and the reason why it is out."""
    problem = _resource_problem(workload, config, device)
    if problem is not None:
        return None, problem
    try:
        actual = _result(call, workload, config)
    except _launch_errors() as failure:
        return None, f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    error = float((actual.double() - expected.double()).abs().max())
    allowed = TOLERANCE[workload.dtype] * float(expected.double().abs().max())
    if not error <= allowed:
        return None, f"result differs by {error:.1e}, allowed {allowed:.1e}"
    return _time(call, workload, config, device), ""


def _result(call: Callable[[], Tensor], workload: Workload, config: Config) -> Tensor:
    with override(workload.kernel, config):
        return call()


def _time(call: Callable[[], Tensor], workload: Workload, config: Config, device: torch.device) -> float:
    """Median milliseconds of a warm call."""
    with override(workload.kernel, config):
        return median_ms(call, device)


def _launch_errors() -> tuple[type[Exception], ...]:
    """What a launch that asks for too much raises."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return (torch.OutOfMemoryError,)
    return (OutOfResources, torch.OutOfMemoryError)


def _resource_problem(workload: Workload, config: Config, device: torch.device) -> str | None:
    """Why a configuration of a GPU kernel is not worth a launch; None if it is, and for the CPU's kernels."""
    if device.type != "cuda":
        return None
    capability = capability_of(device)
    if capability == 0:
        return None  # AMD's: only a launch tells
    from svg2_compile.kernels.triton.rehearsal import compile_launch, nvidia_target, resource_problem

    target = nvidia_target(capability)
    return resource_problem(compile_launch(rehearsed_launch(workload, config, capability), target), target)


def rehearsed_launch(workload: Workload, config: Config, capability: int) -> Launch:
    """The launch that ``config`` is about, as the workload's call would make it on a GPU of ``capability``."""
    from svg2_compile.kernels.triton import implementation
    from svg2_compile.kernels.triton.rehearsal import record_launches

    with record_launches(capability) as (_, launches), override(workload.kernel, config):
        workload.call(torch.device("cuda"), implementation, seed=None)()
    return next(launch for launch in launches if launch.name == HEAD_KERNEL[workload.kernel])
