"""A small workload on this machine's CPU, tables for it, and a cache directory for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.autotune.workloads import Workload
from svg2_compile.kernels.tuning.lookup import device_name, forget_tables
from svg2_compile.kernels.tuning.tables import Measurement, Table, TuningKey, cache_dir, engine_of, merge

CPU = torch.device("cpu")
ENGINE = engine_of(device_name(CPU))
SMALL = Workload("cpu_kmeans", torch.float32, 16, 600, 1)


def machine_name() -> str:
    """What tables of this machine go by now: other tests change the number of threads."""
    return device_name(CPU)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SVG2_CACHE_DIR", str(tmp_path))
    forget_tables()
    yield cache_dir()
    forget_tables()


def measured(scores: int, complete: bool = True) -> Measurement:
    return Measurement({"SCORES_PER_TILE": scores}, 1.0, 2.0, {f"SCORES_PER_TILE={scores}": 1.0}, complete)


def write(folder: Path, measurements: dict[TuningKey, Measurement]) -> Path:
    return merge(Table(machine_name(), ENGINE, measurements), folder)
