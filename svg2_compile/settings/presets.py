"""Presets: settings that were published for a model, or that follow from them. The data is in presets.toml."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from svg2_compile.settings.options import SPECS, ConfigError, parse_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULT_VARIANT", "VARIANTS", "AttentionShape", "Preset", "load_preset", "load_presets"]

VARIANTS = ("quality", "balanced", "turbo", "first_order")
DEFAULT_VARIANT = "balanced"
STATUSES = ("published", "untested")


@dataclass(frozen=True)
class AttentionShape:
    """The self-attention of a model at its usual size: video tokens, heads, head_dim."""

    tokens: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Preset:
    """Settings for one model in one variant.

    name: "model:variant". status: "published" (somebody measured and published these settings for this model) or
    "untested" (carried over from another model). source: where the settings come from. settings: option -> value.
    shape: of the model's attention, for tuning.
    """

    name: str
    model: str
    variant: str
    description: str
    status: str
    source: str
    settings: Mapping[str, Any]
    shape: AttentionShape


@functools.cache
def load_presets() -> Mapping[str, Preset]:
    """All presets by full name ("model:variant"), in the order of the file."""
    text = resources.files("svg2_compile.settings").joinpath("presets.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    presets: dict[str, Preset] = {}
    for model, table in data["models"].items():
        for variant in VARIANTS:
            preset = _read(model, variant, table, data["base"])
            presets[preset.name] = preset
    return presets


def load_preset(name: str) -> Preset:
    """The preset called ``name``: "model", "model:variant" or "model/variant".

    Raises:
        ConfigError: if there is none; names the nearest.
    """
    presets = load_presets()
    model, _, variant = name.strip().lower().replace("/", ":").partition(":")
    full_name = f"{model}:{variant or DEFAULT_VARIANT}"
    if full_name in presets:
        return presets[full_name]
    models = list(dict.fromkeys(preset.model for preset in presets.values()))
    near = [known for known in models if known.startswith(model)] or difflib.get_close_matches(model, models, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"preset={name!r} is not known.{hint} Valid: one of {', '.join(models)}, "
        f"alone or followed by :{', :'.join(VARIANTS)}."
    )


def _read(model: str, variant: str, table: Mapping[str, Any], base: Mapping[str, Any]) -> Preset:
    """One variant of one model: the file's base settings, then the model's own, then those of the variant."""
    own = dict(table.get(variant, {}))
    status = own.pop("status", "untested")
    source = own.pop("source", base[variant]["source"])
    layers = (base["all"], base[variant], table.get("settings", {}), own)
    settings = {key: value for layer in layers for key, value in layer.items() if key != "source"}
    for key, value in settings.items():
        if key not in SPECS or key == "preset":
            raise ConfigError(f"presets.toml: {model}:{variant} has the unknown setting {key!r}.")
        parse_value(key, value)
    if status not in STATUSES:
        raise ConfigError(f"presets.toml: {model}:{variant} has status={status!r}. Valid: {', '.join(STATUSES)}.")
    shape = AttentionShape(table["tokens"], table["heads"], table["head_dim"])
    return Preset(f"{model}:{variant}", model, variant, table["description"], status, source, settings, shape)
