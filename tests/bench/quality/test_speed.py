"""Speed of a step: which points are timed, what a row says, and one short video of a real point."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
from bench.quality.methods import METHODS
from bench.quality.speed import DENSE_STEPS, STEPS, StepTimes, points_of, speed_row, time_steps
from bench.quality.video import Setting
from svg2_compile.minidit.model import VideoSize, load_model

QUALITY = {"method": "tiles+comp", "density": 0.1518, "psnr_mean": 20.0, "ssim_mean": 0.6, "ms_ssim_mean": 0.7}


def test_points_are_what_the_quality_run_asked_for() -> None:
    ((row, (method, selection)),) = points_of([QUALITY, {**QUALITY, "top_p": 0.9}])
    assert row == QUALITY
    assert (method.name, selection) == ("tiles+comp", {"density": 0.15})


def test_a_row_has_the_median_over_rounds_and_the_whole_range() -> None:
    rounds = [StepTimes([2.0, 2.0], [1.0, 1.0]), StepTimes([4.0, 5.0], [1.0, 2.0]), StepTimes([3.0], [1.0])]
    row = speed_row(QUALITY, rounds)
    assert row["speedup"] == 3.0  # of 2, 3 and 3
    assert row["speedup_range"] == [1.0, 5.0]
    assert (row["psnr_mean"], row["dense_step"]["runs"], row["sparse_step"]["median_ms"]) == (20.0, 5, 1000.0)


def test_dense_and_sparse_steps_of_one_short_video() -> None:
    setting = Setting(VideoSize(8, 32, 32), STEPS, 3.0, dense_steps=DENSE_STEPS)
    times = time_steps(load_model(), setting, (METHODS[0], {"density": 0.25}))
    assert len(times.dense) == DENSE_STEPS - 1 and len(times.sparse) == STEPS - DENSE_STEPS - 1
    assert min(*times.dense, *times.sparse) > 0
