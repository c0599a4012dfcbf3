"""A profile that was measured: its figures, and that the cost model goes by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.tuning.lookup import device_name, forget_tables
from svg2_compile.kernels.tuning.tables import PROFILE_FIGURES, Table, engine_of, merge, read_table, write_table
from svg2_compile.passes.cost_model import crossover_tokens, dense_seconds, sparse_seconds
from svg2_compile.passes.device_profile import CPU, DeviceProfile, profile_for
from svg2_compile.tools.calibrate import CalibrationSize, measure_profile

CPU_DEVICE = torch.device("cpu")
SIZE = CalibrationSize(num_tokens=512, num_heads=2, head_dim=32, dtype=torch.float32)
FIGURES = dict(zip(PROFILE_FIGURES, (2e11, 1e11, 9e10, 1e10, 0.0, 1e-4, 1e-3), strict=True))


@pytest.fixture(autouse=True)
def _tables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SVG2_CACHE_DIR", str(tmp_path))
    forget_tables()
    yield
    forget_tables()


def keep(profile: dict[str, float]) -> Path:
    name = device_name(CPU_DEVICE)
    path = merge(Table(name, engine_of(name), profile=profile))
    forget_tables()
    return path


def test_what_is_measured_are_the_figures_of_a_profile() -> None:
    profile = measure_profile(CPU_DEVICE, SIZE)
    assert set(profile) == set(PROFILE_FIGURES)
    measured = DeviceProfile("here", **profile, source="test")
    # Between a slow machine and one faster than any: a wrong unit is a thousand times off.
    assert all(1e7 < getattr(measured, rate) < 1e14 for rate in ("dense_flops", "sparse_flops", "kmeans_flops"))
    assert 0 < float(sparse_seconds(SIZE.cost(), measured)) < 10
    assert 0 < float(dense_seconds(SIZE.cost(), measured)) < 10


def test_the_cost_model_goes_by_what_was_measured() -> None:
    assert profile_for(CPU_DEVICE) == CPU
    keep(FIGURES)
    measured = profile_for(CPU_DEVICE)
    assert measured.name == CPU.name and "svg2 tune" in measured.source
    assert {name: getattr(measured, name) for name in PROFILE_FIGURES} == FIGURES
    slower = crossover_tokens(CalibrationSize.of(CPU_DEVICE).cost(), measured)
    keep({**FIGURES, "sparse_flops": 2e11})
    faster = crossover_tokens(CalibrationSize.of(CPU_DEVICE).cost(), profile_for(CPU_DEVICE))
    assert slower is not None and faster is not None and faster < slower


def test_kernels_that_are_tuned_later_leave_the_profile(tmp_path: Path) -> None:
    keep(FIGURES)
    name = device_name(CPU_DEVICE)
    path = merge(Table(name, engine_of(name)))
    assert read_table(path).profile == FIGURES


@pytest.mark.parametrize(
    "broken", [{"dense_flops": 0}, {"call_overhead": -1}, {"bandwidth": "fast"}, {"sparse_flops": None}]
)
def test_a_figure_that_cannot_be_is_no_table(broken: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_table(path, Table("cpu", "torch", profile={**FIGURES, **broken}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="incomplete or has a wrong type"):
        read_table(path)
