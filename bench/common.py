"""What all benchmarks share: fair timing, peak memory, the machine's description, the correctness gate, JSON output."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
IMAGES = BENCH.parent / "docs" / "img"


@dataclass(frozen=True)
class Timing:
    """Times of one function over repeated runs, in milliseconds."""

    runs_ms: tuple[float, ...]

    @classmethod
    def of_seconds(cls, seconds: Iterable[float]) -> Timing:
        return cls(tuple(1e3 * second for second in seconds))

    @property
    def median_ms(self) -> float:
        return statistics.median(self.runs_ms)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how much the machine disturbed the measurement."""
        return (max(self.runs_ms) - min(self.runs_ms)) / self.median_ms

    def to_json(self) -> dict[str, float | int]:
        return {
            "median_ms": round(self.median_ms, 3),
            "fastest_ms": round(min(self.runs_ms), 3),
            "spread": round(self.spread, 3),
            "runs": len(self.runs_ms),
        }


def measure(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each function ``repeats`` times after one warm-up run.

    The functions take turns, so that a disturbance of the machine meets all of them and not one.
    """
    for function in functions.values():
        function()
    runs: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            runs[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(tuple(values)) for name, values in runs.items()}


def peak_rss_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts what a process was before exec into ru_maxrss: a child would seem as large as its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _send_memory_growth(target: Callable[..., object], args: tuple[Any, ...], connection: Any) -> None:
    function = target(*args)
    before = peak_rss_mib()
    if callable(function):
        function()
    connection.send(peak_rss_mib() - before)


def peak_memory_growth(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """MiB by which the peak resident set grows while the function that ``prepare(*args)`` returns runs once.

    Runs in a process of its own, as a peak never comes down again. ``prepare`` must be importable.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_memory_growth, args=(prepare, args, sender))
    process.start()
    sender.close()
    try:
        growth = float(receiver.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"the memory measurement ended with exit code {process.exitcode}") from None
    process.join()
    return growth


def environment() -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the checkout, with "+" where tracked files were changed; "unknown" outside a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=BENCH, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def require_close(what: str, actual: Tensor, exact: Tensor, tolerance: float) -> float:
    """Largest error relative to the largest exact value. Raises AssertionError above ``tolerance``: no speed then."""
    error = float((actual.double() - exact.double()).abs().max() / exact.double().abs().max())
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {tolerance:.2e}; no times are reported")
    return error


def write_results(name: str, results: Sequence[Mapping[str, Any]], **extra: Any) -> Path:
    """Write bench/results/<name>.json: environment, anything extra, results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "environment": environment(), **extra, "results": list(results)}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
