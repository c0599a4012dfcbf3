"""The device that is measured: its name, how time and memory are taken there, what a reader must know about it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.common import Timing

__all__ = ["TIMING", "Machine"]

TIMING = (
    "CUDA events around every call, median of the runs; functions that are compared take turns. Before each call the "
    "L2 cache is flushed (a buffer of twice its size is written) and the device is kept busy for some milliseconds, so "
    "that the host is ahead and the time is the device's. spread = (slowest - fastest) / median."
)
BUSY_CYCLES = 20_000_000  # about 10 ms


class Machine:
    """One device. On a CPU (rehearsals) times come from the host's clock and memory is not measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(max(2 * cache, 1 << 20), dtype=torch.uint8, device=device)

    def measure(self, functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
        """Time every function ``repeats`` times after one call of each that is not counted."""
        if not self.is_cuda:
            return common.measure(functions, repeats)
        for function in functions.values():
            function()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        runs: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                self._flushed.zero_()
                torch.cuda._sleep(BUSY_CYCLES)
                begin.record()
                function()
                end.record()
                end.synchronize()
                runs[name].append(begin.elapsed_time(end))
        return {name: Timing(tuple(values)) for name, values in runs.items()}

    def launch_ms(self, function: Callable[[], object]) -> float:
        """Milliseconds that the host needs to start ``function``, which must be warm."""
        self.synchronize()
        start = time.perf_counter()
        function()
        elapsed = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return round(elapsed, 3)

    def workspace_mib(self, function: Callable[[], tuple[Tensor, ...]]) -> float | None:
        """MiB that ``function`` allocates at its peak, besides the tensors that it returns. None on a CPU."""
        if not self.is_cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = function()
        self.synchronize()
        growth = torch.cuda.max_memory_allocated(self.device) - before
        return round((growth - sum(result.nbytes for result in results)) / 2**20, 1)

    def host_synchronisations(self, function: Callable[[], object]) -> int | None:
        """How often ``function``, which must be warm, waits for the device, as PyTorch sees it. None on a CPU."""
        if not self.is_cuda:
            return None
        self.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """``function`` as the replay of a CUDA graph; itself on a CPU."""
        if not self.is_cuda:
            return function
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()

        def replay() -> object:
            graph.replay()
            return function  # the graph reads tensors that only the function holds: they live as long as the replay

        return replay

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory that nothing uses back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    @property
    def slug(self) -> str:
        """What result files are named after: "NVIDIA H200" -> "h200"."""
        if not self.is_cuda:
            return "cpu"
        name = torch.cuda.get_device_name(self.device).lower()
        words = re.sub(r"\b(nvidia|amd|geforce|instinct)\b", " ", name)
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "gpu"

    def environment(self) -> dict[str, Any]:
        """Device, versions and commit."""
        import triton

        described = {**common.environment(), "triton": triton.__version__, "slug": self.slug}
        if not self.is_cuda:
            return described
        properties = torch.cuda.get_device_properties(self.device)
        return {
            **described,
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "state": gpu_state(),
        }


def gpu_state() -> str:
    """Driver, clocks, power and temperature as nvidia-smi reports them now, or why it does not."""
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    finished = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=False, timeout=30
    )
    return " | ".join(finished.stdout.split("\n")).strip(" |") or finished.stderr.strip()
