"""Presets: every model in every variant, and what was published stays as it was published."""

from __future__ import annotations

import pytest

from svg2_compile.settings.config import ConfigError, Svg2Config
from svg2_compile.settings.presets import VARIANTS, load_preset, load_presets


def test_each_model_has_each_variant() -> None:
    names = list(load_presets())
    models = dict.fromkeys(name.split(":")[0] for name in names)
    assert names == [f"{model}:{variant}" for model in models for variant in VARIANTS]
    assert {"wan2.1-14b-720p", "wan2.1-1.3b-480p", "wan2.2-14b-720p", "hunyuanvideo-720p"} <= models.keys()
    assert {"cogvideox", "ltx", "mochi", "skyreels-v2", "allegro"} <= models.keys()


@pytest.mark.parametrize("name", load_presets())
def test_loads_and_survives_a_round_trip(name: str) -> None:
    config = Svg2Config.from_options({"preset": name})
    assert config.preset == name
    assert Svg2Config.from_options(config.to_dict()) == config
    preset = load_preset(name)
    assert preset.status in ("published", "untested")
    assert preset.source
    # Quality falls and speed rises along the variants.
    variants = [Svg2Config.from_options({"preset": f"{preset.model}:{variant}"}) for variant in VARIANTS[:3]]
    top_p = [variant.selection()[0] for variant in variants]
    assert top_p == sorted(top_p, reverse=True)


def test_published_settings() -> None:
    wan = Svg2Config.from_options({"preset": "wan2.1-14b-720p:quality"})
    assert (wan.num_q_clusters, wan.num_k_clusters, wan.top_p, wan.min_k_ratio) == (300, 1000, 0.9, 0.1)
    assert (wan.init_iters, wan.step_iters, wan.dense_steps, wan.dense_layers) == (50, 2, 0.2, 0.03)
    hunyuan = Svg2Config.from_options({"preset": "hunyuanvideo-720p:quality"})
    assert (hunyuan.num_q_clusters, hunyuan.num_k_clusters, hunyuan.dense_steps) == (400, 1000, 0.1)
    ear = Svg2Config.from_options({"preset": "wan2.2-14b-720p:quality"})
    assert (ear.top_p, ear.compensation, ear.routing, ear.dense_layers) == (0.85, "centroid", "error", 0.025)
    turbo = Svg2Config.from_options({"preset": "wan2.2-14b-720p:turbo"})
    assert (turbo.top_p, turbo.compensation, turbo.dense_steps) == (0.7, "none", 0.3)


@pytest.mark.parametrize("model", dict.fromkeys(name.split(":")[0] for name in load_presets()))
def test_the_new_default_is_a_variant_that_nobody_tested(model: str) -> None:
    config = Svg2Config.from_options({"preset": f"{model}:first_order"})
    assert load_preset(f"{model}:first_order").status == "untested"
    default = Svg2Config(compensation="first_order", density=0.1)
    names = ("compensation", "routing", "budget", "init_iters", "step_iters", "num_q_clusters", "num_k_clusters")
    assert {name: getattr(config, name) for name in names} == {name: getattr(default, name) for name in names}
    assert config.selection() == (0.9, 0.1)


def test_spellings() -> None:
    spelled = [
        Svg2Config.from_options({"preset": name}) for name in ("ltx", "ltx:balanced", "ltx/balanced", "LTX/Balanced")
    ]
    assert len(set(spelled)) == 1


def test_options_override_the_preset() -> None:
    config = Svg2Config.from_options({"top_p_kmeans": 0.42, "preset": "wan2.1-14b-720p:quality", "dense_steps": 3})
    assert (config.top_p, config.dense_steps, config.num_q_clusters) == (0.42, 3, 300)


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"'wan2.1'.*Did you mean 'wan2.1-14b-720p'.*mochi"):
        load_preset("wan2.1")
    with pytest.raises(ConfigError, match="turbo"):
        Svg2Config.from_options({"preset": "ltx:fastest"})
    with pytest.raises(ConfigError, match="not known"):
        Svg2Config(preset="nothing")
