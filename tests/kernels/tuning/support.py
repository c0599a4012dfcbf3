"""A small workload on this machine's CPU, and tables for it."""

from __future__ import annotations

from pathlib import Path

import torch

from svg2_compile.kernels.tuning.lookup import device_name
from svg2_compile.kernels.tuning.tables import Measurement, Table, TuningKey, engine_of, merge
from svg2_compile.kernels.tuning.workloads import Workload

CPU = torch.device("cpu")
NAME = device_name(CPU)
ENGINE = engine_of(NAME)
SMALL = Workload("cpu_kmeans", torch.float32, 16, 600, 1)


def measured(scores: int, complete: bool = True) -> Measurement:
    return Measurement({"SCORES_PER_TILE": scores}, 1.0, 2.0, {f"SCORES_PER_TILE={scores}": 1.0}, complete)


def write(folder: Path, measurements: dict[TuningKey, Measurement]) -> Path:
    return merge(Table(NAME, ENGINE, measurements), folder)
