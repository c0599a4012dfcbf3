"""Svg2Config: ranges, aliases, strings, presets and the cache key."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg2_compile.settings.config import ConfigError, Svg2Config
from svg2_compile.settings.options import ALIASES, SPECS, parse_value


def test_defaults_are_the_documented_ones() -> None:
    config = Svg2Config.from_options(None)
    assert config == Svg2Config() == Svg2Config.from_options({})
    assert (config.selection(), config.min_k_ratio) == ((0.9, 0.1), 0.1)
    assert (config.compensation, config.routing, config.budget) == ("first_order", "error", "layer")
    assert (config.init_iters, config.step_iters) == (10, 1)
    assert (config.dense_steps, config.dense_layers, config.min_tokens) == (0.2, 0, "auto")
    assert config.num_q_clusters is None
    assert config.num_k_clusters is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.8}, (0.8, None)),
        ({"top_p": 0.8, "density": 0.1}, (0.8, 0.1)),
        ({"density": None}, (0.9, None)),
        ({"density": "0.4"}, (0.9, 0.4)),
        ({"compensation": "centroid"}, (0.9, 0.25)),
        ({"compensation": "none"}, (0.9, None)),
        ({"compensation": "none", "density": 0.3}, (0.9, 0.3)),
        ({"preset": "wan2.2-14b-720p:quality"}, (0.85, None)),
        ({"preset": "wan2.2-14b-720p:quality", "density": 0.2}, (0.85, 0.2)),
    ],
)
def test_a_mass_or_a_budget_decides(options: dict[str, Any], expected: tuple[float, float | None]) -> None:
    config = Svg2Config.from_options(options)
    assert config.selection() == expected
    policy = config.sparsity_policy()
    assert (policy.top_p, policy.density) == expected == (config.site_policy().top_p, config.site_policy().density)
    assert Svg2Config.from_options(config.to_dict()).selection() == expected


def test_changes_take_the_default_selection_along() -> None:
    assert Svg2Config().replace(top_p=0.5).selection() == (0.5, None)
    assert Svg2Config(top_p=0.5).replace(compensation="none").selection() == (0.5, None)
    assert Svg2Config().replace(compensation="none").selection() == (0.9, None)
    assert Svg2Config(compensation="none").replace(compensation="centroid").selection() == (0.9, 0.25)


def test_dense_layers_follow_the_compensation_unless_they_are_given() -> None:
    names = ("none", "centroid", "first_order")
    assert [Svg2Config(compensation=name).dense_layers for name in names] == [0.03, 0.03, 0]
    plain = Svg2Config().replace(compensation="none")
    assert plain.dense_layers == 0.03 and plain.replace(compensation="first_order").dense_layers == 0
    assert Svg2Config(dense_layers=2).replace(compensation="none").dense_layers == 2
    assert Svg2Config(compensation="none", dense_layers="auto").dense_layers == 0.03
    published = {"preset": "wan2.1-14b-720p:quality", "compensation": "first_order", "density": 0.1}
    assert Svg2Config.from_options(published).dense_layers == 0.03


def test_every_field_has_a_spec_and_the_other_way_round() -> None:
    assert [field.name for field in dataclasses.fields(Svg2Config)] == list(SPECS)
    assert set(ALIASES.values()) <= set(SPECS)


def test_frozen_and_hashable() -> None:
    config = Svg2Config(top_p=0.8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_p = 0.7  # type: ignore[misc]
    assert {config: 1}[Svg2Config(top_p=0.8)] == 1
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("name", "given_value", "expected"),
    [
        ("top_p", "0.75", 0.75),
        ("top_p", 1, 1.0),
        ("top_p", None, None),
        ("density", "none", None),
        ("density", "AUTO", "auto"),
        ("density", "0.25", 0.25),
        ("num_q_clusters", "300", 300),
        ("num_k_clusters", "None", None),
        ("dense_steps", "3", 3),
        ("dense_steps", "0.3", 0.3),
        ("dense_steps", 0, 0),
        ("dense_steps", 0.0, 0.0),
        ("min_tokens", "AUTO", "auto"),
        ("min_tokens", "4096", 4096),
        ("compensation", "Centroid", "centroid"),
        ("strict", "true", True),
        ("collect_stats", "0", False),
        ("store_limit_mb", "512", 512.0),
        ("workspace_mb", "64", 64),
        ("inductor_mode", None, None),
    ],
)
def test_values_and_strings(name: str, given_value: Any, expected: Any) -> None:
    value = getattr(Svg2Config.from_options({name: given_value}), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_p", float("nan")),
        ("top_p", "much"),
        ("top_p", True),
        ("density", 0),
        ("density", "some"),
        ("density", 1.01),
        ("min_k_ratio", 2),
        ("num_q_clusters", 0),
        ("num_k_clusters", 2.5),
        ("num_k_clusters", True),
        ("init_iters", 0),
        ("step_iters", -1),
        ("dense_steps", 1.0),
        ("dense_steps", -1),
        ("dense_steps", -0.5),
        ("dense_steps", True),
        ("dense_layers", "1.5"),
        ("min_tokens", "long"),
        ("min_tokens", -1),
        ("min_tokens", 0.5),
        ("compensation", "mean"),
        ("routing", ""),
        ("inner_backend", 3),
        ("strict", 1),
        ("strict", "perhaps"),
        ("store_limit_mb", 0),
        ("workspace_mb", 0),
        ("store_limit_mb", float("inf")),
        ("top_p", [0.9]),
        ("dump_dir", 3),
    ],
)
def test_bad_values_are_named_with_their_range(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Svg2Config.from_options({name: bad})
    text = str(caught.value)
    assert name in text
    assert repr(bad) in text
    assert SPECS[name].valid in text


def test_ranges_hold_for_the_constructor_and_for_replace_too() -> None:
    with pytest.raises(ConfigError, match="top_p=2"):
        Svg2Config(top_p=2)
    with pytest.raises(ConfigError, match="top_p=2"):
        Svg2Config().replace(top_p=2)
    assert Svg2Config().replace(top_p_kmeans="0.5").top_p == 0.5


def test_unknown_option_names_the_nearest_and_all_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option 'top_pp'") as caught:
        Svg2Config.from_options({"top_pp": 0.9})
    text = str(caught.value)
    assert "Did you mean 'top_p'?" in text
    assert all(name in text for name in SPECS)
    with pytest.raises(ConfigError, match="Did you mean 'num_q_centroids'"):
        Svg2Config.from_options({"num_q_centroid": 100})


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_aliases(alias: str) -> None:
    value = 7 if SPECS[ALIASES[alias]].kinds[0] == "int" else 0.5
    assert getattr(Svg2Config.from_options({alias: value}), ALIASES[alias]) == value
    with pytest.raises(ConfigError, match="two spellings") as caught:
        Svg2Config.from_options({alias: value, ALIASES[alias]: value})
    assert alias in str(caught.value)


def test_an_error_uses_the_spelling_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"top_p_kmeans=3 is not valid.*\[0, 1\]"):
        Svg2Config.from_options({"top_p_kmeans": 3})


def test_error_routing_needs_compensation() -> None:
    assert Svg2Config().routing == "error"
    assert Svg2Config(compensation="none").routing == "score"
    assert Svg2Config(routing="score").compensation == "first_order"
    with pytest.raises(ConfigError, match="compensation='centroid'"):
        Svg2Config(routing="error", compensation="none")


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"compensation": "first_order", "density": 0.2}, "layer"),
        ({"compensation": "first_order", "top_p": 0.8}, "row"),
        ({"compensation": "first_order", "routing": "score"}, "row"),
        ({"compensation": "first_order", "density": 0.2, "budget": "row"}, "row"),
        ({"compensation": "centroid"}, "row"),
        ({"compensation": "centroid", "budget": "layer"}, "layer"),
        ({"compensation": "none"}, "row"),
    ],
)
def test_the_budget_is_the_layers_with_first_order_compensation(options: dict[str, Any], budget: str) -> None:
    config = Svg2Config.from_options(options)
    assert config.budget == budget == config.sparsity_policy().budget
    assert Svg2Config.from_options(config.to_dict()) == config


def test_a_budget_of_the_layer_needs_a_density_and_routing_by_error() -> None:
    with pytest.raises(ConfigError, match=r"budget='layer' divides a density .* Valid: a density with it"):
        Svg2Config(budget="layer", top_p=0.8)
    with pytest.raises(ConfigError, match=r"budget='layer' spends pairs .* Valid: routing='error'"):
        Svg2Config(budget="layer", routing="score")
    with pytest.raises(ConfigError, match="budget='layer' spends pairs"):
        Svg2Config(budget="layer", compensation="none")


def test_the_budget_follows_what_it_depends_on() -> None:
    pooled = Svg2Config(compensation="first_order", density=0.2)
    assert pooled.replace(density=0.1).budget == "layer"
    assert pooled.replace(top_p=0.8, density=None).budget == "row"
    assert pooled.replace(compensation="centroid").budget == "row"
    assert Svg2Config(compensation="centroid", budget="layer").replace(density=0.1).budget == "layer"


def test_routing_follows_a_changed_compensation() -> None:
    plain = Svg2Config().replace(compensation="none")
    assert (plain.compensation, plain.routing) == ("none", "score")
    assert plain.replace(compensation="centroid").routing == "error"
    balanced = Svg2Config.from_options({"preset": "ltx:balanced", "compensation": "none"})
    assert (balanced.compensation, balanced.routing) == ("none", "score")
    published = {"preset": "wan2.1-14b-720p:quality"}
    assert Svg2Config.from_options(published).compensation == "none"
    assert Svg2Config.from_options({**published, "compensation": "centroid"}).routing == "error"
    assert Svg2Config.from_options({**published, "compensation": "centroid", "routing": "score"}).routing == "score"


def test_inner_backend_and_mode() -> None:
    assert Svg2Config(inductor_mode="max-autotune").inductor_mode == "max-autotune"
    with pytest.raises(ConfigError, match="'max-autotune'"):
        Svg2Config(inductor_mode="fastest")
    with pytest.raises(ConfigError, match="inner_backend='eager'"):
        Svg2Config(inductor_mode="max-autotune", inner_backend="eager")
    with pytest.raises(ConfigError, match="inner_backend='svg2'"):
        Svg2Config(inner_backend="svg2")


def test_policies_copy_the_settings() -> None:
    config = Svg2Config(top_p=0.7, compensation="centroid", routing="error", density=0.5, min_tokens=12)
    for policy in (config.sparsity_policy(), config.site_policy()):
        copied = {item.name: getattr(policy, item.name) for item in dataclasses.fields(policy)}
        assert copied.items() <= config.to_dict().items()
        assert {"top_p", "density"} <= copied.keys()
    assert config.site_policy().min_tokens == 12
    assert config.sparsity_policy().routing == "error"


def test_cache_key_covers_every_setting() -> None:
    changed: dict[str, Any] = {
        "preset": "ltx:turbo",
        "top_p": 0.5,
        "density": 0.5,
        "target_error": 0.5,
        "measure_error": True,
        "min_k_ratio": 0.5,
        "num_q_clusters": 5,
        "num_k_clusters": 5,
        "init_iters": 5,
        "step_iters": 5,
        "dense_steps": 5,
        "dense_last_steps": 5,
        "dense_timesteps": 0.5,
        "dense_layers": 5,
        "min_tokens": 5,
        "compensation": "none",
        "routing": "score",
        "budget": "row",
        "balance_heads": True,
        "inner_backend": "eager",
        "inductor_mode": "max-autotune",
        "strict": True,
        "collect_stats": False,
        "store_limit_mb": 5.0,
        "workspace_mb": 64,
        "dump_dir": "x",
    }
    assert set(SPECS) == set(changed)
    keys = {Svg2Config(**{name: value}).cache_key() for name, value in changed.items()}
    keys |= {Svg2Config().cache_key()}
    assert len(keys) == len(changed) + 1
    assert Svg2Config(dense_steps=0).cache_key() != Svg2Config(dense_steps=0.0).cache_key()


def test_cache_key_is_the_same_in_another_process() -> None:
    program = "from svg2_compile.settings.config import Svg2Config; print(Svg2Config(top_p=0.7).cache_key())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Svg2Config(top_p=0.7).cache_key()


def test_cache_key_changes_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Svg2Config().cache_key()
    monkeypatch.setattr("svg2_compile.settings.config.package_version", lambda: "999")
    assert Svg2Config().cache_key() != before


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5000), st.floats(), st.text(max_size=8), st.just("0.5"), st.just("12")
)


@given(name=st.sampled_from(sorted(SPECS)), value=SCALARS)
def test_any_scalar_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    """Nothing but ConfigError comes out, and what is taken reads the same again (also from its text)."""
    complaint = ""
    try:
        parsed = parse_value(name, value)
    except ConfigError as error:
        complaint = str(error)
    if complaint:
        assert name in complaint
        assert SPECS[name].valid in complaint
        return
    assert parse_value(name, parsed) == parsed
    assert parse_value(name, str(parsed)) == parsed
