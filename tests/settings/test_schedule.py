"""A density over the steps: its spellings, what it is at a step, and what refuses it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from svg2_compile.settings.config import ConfigError, Svg2Config
from svg2_compile.settings.schedule import DensitySchedule


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("0.3..0.05", "0.3..0.05"),
        (" 0.30 .. .05 ", "0.3..0.05"),
        ([0.4, 0.2, 0.1], "0.4, 0.2, 0.1"),
        ((0.4, 1), "0.4, 1"),
        ("0.4,0.2 , 0.1", "0.4, 0.2, 0.1"),
        ("[0.4, 0.2]", "0.4, 0.2"),
    ],
)
def test_one_text_for_every_spelling(given: Any, text: str) -> None:
    config = Svg2Config.from_options({"density": given})
    assert config.density == text == str(config.density_schedule())
    again = Svg2Config.from_options(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.cache_key() == config.cache_key() != Svg2Config().cache_key()
    assert config.budget == "layer"


NO_SCHEDULES = ["0.3..", "..0.1", "0.3..0.1..0.2", "0.3..0", "0.3..1.1", [0.1, 0.0], [0.1], [], "0.1; 0.2"]


@pytest.mark.parametrize("bad", NO_SCHEDULES)
def test_what_is_no_schedule(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"density=.* Valid: .*'0.3..0.05' \(from the first to the last sparse"):
        Svg2Config(density=bad)


def test_a_ramp_has_even_differences_and_a_list_stays_at_its_end() -> None:
    ramp, steps = DensitySchedule.read("0.3..0.1"), DensitySchedule.read("0.5, 0.2")
    assert ramp is not None and steps is not None
    assert [round(ramp.at(index, 5), 6) for index in range(6)] == [0.3, 0.25, 0.2, 0.15, 0.1, 0.1]
    assert ramp.at(0, 1) == 0.3
    assert [steps.at(index, 3) for index in range(4)] == [0.5, 0.2, 0.2, 0.2]
    assert (round(ramp.mean, 6), steps.mean) == (0.2, 0.35)


def test_the_cost_model_takes_the_mean() -> None:
    config = Svg2Config(density="0.3..0.1")
    assert config.site_policy().density == config.sparsity_policy().density == pytest.approx(0.2)


def test_presets_take_schedules_and_targets() -> None:
    preset = {"preset": "wan2.1-14b-720p:first_order"}
    assert Svg2Config.from_options({**preset, "density": "0.2..0.05"}).density == "0.2..0.05"
    followed = Svg2Config.from_options({**preset, "target_error": "0.02"})  # begins with the preset's density
    assert (followed.target_error, followed.selection()[1], followed.budget) == (0.02, 0.1, "layer")
    with pytest.raises(ConfigError, match=r"target_error=0.02 moves the density"):
        Svg2Config.from_options({"preset": "wan2.1-14b-720p:quality", "target_error": 0.02})


@pytest.mark.parametrize("options", [{"budget": "row"}, {"compensation": "none"}, {"compensation": "centroid"}])
def test_rows_have_one_density_for_all_steps(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"density='0.3..0.05' changes from step to step, but budget='row'"):
        Svg2Config(density="0.3..0.05", **options)
    assert Svg2Config(density="0.3..0.05", compensation="centroid", budget="layer").budget == "layer"
