"""Which steps and layers stay dense: counts, fractions, both ends, the timestep's range, and schedules nobody knows."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from svg2_compile.logs.logger import Once
from svg2_compile.runtime.dense_rules import DenseLayers, dense_step_count, dense_step_reason
from svg2_compile.runtime.standing import Standing
from svg2_compile.settings.config import Svg2Config


def _standing(step: int, num_steps: int | None = None, **more: Any) -> Standing:
    return Standing("", 0, step, num_steps, 0, 0, "context", **more)


def _sparse_steps(num_steps: int, known: bool = True, **options: Any) -> list[int]:
    config = Svg2Config(**options)
    standings = [
        _standing(
            step, num_steps if known else None, timestep=1000.0 * (1 - step / num_steps), progress=step / num_steps
        )
        for step in range(num_steps)
    ]
    return [s.step for s in standings if dense_step_reason(config, s, Once()) is None]


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({}, range(2, 10)),
        ({"dense_steps": 0}, range(10)),
        ({"dense_steps": 3}, range(3, 10)),
        ({"dense_steps": 0.25}, range(3, 10)),
        ({"dense_steps": 20}, []),
        ({"dense_steps": 0, "dense_last_steps": 2}, range(8)),
        ({"dense_steps": 1, "dense_last_steps": 0.1}, range(1, 9)),
        ({"dense_timesteps": 0.25}, range(3, 10)),  # 1000, 900 and 800 are above 750
        ({"dense_timesteps": 0.25, "dense_steps": 5}, range(5, 10)),
        ({"first_times_fp": 0.25}, range(3, 10)),
    ],
)
def test_steps_of_a_known_schedule(options: dict[str, Any], sparse: Any) -> None:
    config = Svg2Config.from_options(options).to_dict()
    assert _sparse_steps(10, **config) == list(sparse)


@pytest.mark.parametrize("num_steps", [4, 5, 6, 7, 8, 20, 50])
def test_the_default_leaves_at_least_half_of_the_steps_sparse(num_steps: int) -> None:
    assert len(_sparse_steps(num_steps)) >= num_steps / 2


def test_the_reason_names_the_option() -> None:
    config = Svg2Config(dense_steps=1, dense_last_steps=1, dense_timesteps=0.5)
    reasons = [dense_step_reason(config, _standing(s, 5, timestep=1000.0 - 200 * s), Once()) for s in range(5)]
    assert reasons == ["dense_steps", "dense_timesteps", "dense_timesteps", None, "dense_last_steps"]


def test_the_end_of_an_unknown_schedule_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="svg2_compile"):
        assert _sparse_steps(10, known=False, dense_steps=0, dense_last_steps=2) == list(range(10))
    assert "dense_last_steps=2 has no effect" in caplog.text


def test_the_spacing_of_the_timesteps_tells_a_schedule_of_unknown_length() -> None:
    config = Svg2Config()  # 0.2
    assert dense_step_reason(config, _standing(2, estimated_steps=8, progress=0.1), Once()) is None
    assert dense_step_reason(config, _standing(2, estimated_steps=50, progress=0.9), Once()) == "dense_steps"
    assert dense_step_reason(config, _standing(1, progress=0.1), Once()) == "dense_steps"
    assert dense_step_reason(config, _standing(1, progress=0.3), Once()) is None


def test_a_schedule_of_which_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    config = Svg2Config()
    with caplog.at_level(logging.WARNING, logger="svg2_compile"):
        reasons = [dense_step_reason(config, _standing(step), Once()) for step in range(4)]
    assert reasons == ["dense_steps", "dense_steps", None, None]
    assert "the first 2 steps stay dense" in caplog.text  # what is done is what is said


def test_counts() -> None:
    assert [dense_step_count(0.2, n) for n in (4, 5, 50)] == [1, 1, 10]
    assert dense_step_count(3, 50) == 3


# --------------------------------------------------------------------------------------------------------------- layers
def test_graphs_of_several_layers_count_on() -> None:
    """Two pieces of a model between graph breaks; the second is compiled again for another size."""
    layers = DenseLayers(3)
    first, second = [f"blocks.{i}.attn" for i in range(2)], [f"blocks.{i}.attn" for i in range(2, 6)]
    assert [layers.of_graph(names) for names in (first, second, first, second)] == [2, 1, 2, 1]


@pytest.mark.parametrize("expected", [None, 10])
def test_a_fraction_is_one_of_the_whole_model(expected: int | None) -> None:
    layers = DenseLayers(0.3, expected)
    first = [layers.of_layer(number, f"blocks.{number}") for number in range(10)]
    layers.settle()
    later = [layers.of_layer(number, f"blocks.{number}") for number in range(10)]
    assert later == [True] * 3 + [False] * 7
    assert expected is None or first == later
    assert layers.names == ["blocks.0", "blocks.1", "blocks.2"]


def test_calling_the_layers_again_does_not_count_them_again() -> None:
    layers = DenseLayers(0.3)
    for _ in range(4):
        dense = [layers.of_layer(number, "") for number in range(10)]
        layers.settle()
    assert sum(dense) == 3
