"""Which density a step has, by what is known of the schedule."""

from __future__ import annotations

import logging

import pytest

from svg2_compile.logs.logger import Once
from svg2_compile.runtime.densities import density_of_step
from svg2_compile.runtime.standing import Standing
from svg2_compile.settings.config import Svg2Config

RAMP = Svg2Config(density="0.3..0.1", dense_steps=2, dense_last_steps=1)


def standing(step: int, num_steps: int | None, estimated: int | None = None) -> Standing:
    return Standing("0", 0, step, num_steps, 0, 0, "scheduler", estimated_steps=estimated)


@pytest.fixture
def once() -> Once:
    return Once(logging.getLogger("svg2_compile"))


def test_it_falls_over_the_sparse_steps_alone(once: Once) -> None:
    found = [density_of_step(RAMP, standing(step, 8), 2, once) for step in range(2, 7)]
    assert found == pytest.approx([0.3, 0.25, 0.2, 0.15, 0.1])


def test_the_length_may_be_an_estimate(once: Once) -> None:
    assert density_of_step(RAMP, standing(4, None, estimated=8), 2, once) == pytest.approx(0.2)


def test_an_unknown_length_is_said_once(once: Once, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="svg2_compile"):
        found = [density_of_step(RAMP, standing(step, None), 2, once) for step in (2, 8, 20)]
    assert found == pytest.approx([0.3, 0.1, 0.1])
    assert len(caplog.records) == 1 and "falls over 10 steps" in caplog.text
    assert density_of_step(Svg2Config(density="0.3, 0.1"), standing(3, None), 2, once) == 0.1
    assert len(caplog.records) == 1


def test_without_a_step_it_is_the_mean_and_without_a_schedule_the_number(once: Once) -> None:
    assert density_of_step(RAMP, None, None, once) == pytest.approx(0.2)
    assert density_of_step(Svg2Config(density=0.15), None, None, once) == 0.15
    assert density_of_step(Svg2Config(top_p=0.8), standing(0, 4), 0, once) is None
