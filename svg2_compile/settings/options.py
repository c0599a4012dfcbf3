"""Plain scalars as a user writes them -> values of Svg2Config, or an error that says what would have been right.

Options arrive from ``options={...}``, from a JSON file, from a command line (all strings) and under the spellings of
the SVG2 scripts. Everything here is about one option at a time; what must hold between options is config.py's.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svg2_compile.settings.schedule import EXAMPLES, DensitySchedule

__all__ = ["ALIASES", "SPECS", "ConfigError", "canonical_names", "parse_value"]

# The spellings of the SVG2 scripts.
ALIASES: Mapping[str, str] = {
    "top_p_kmeans": "top_p",
    "min_kc_ratio": "min_k_ratio",
    "num_q_centroids": "num_q_clusters",
    "num_k_centroids": "num_k_clusters",
    "kmeans_iter_init": "init_iters",
    "kmeans_iter_step": "step_iters",
    "first_times_fp": "dense_timesteps",
    "first_layers_fp": "dense_layers",
}

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


class ConfigError(ValueError):
    """An option is unknown, has a wrong type or is out of range. Names the option, what was given and what is valid."""


@dataclass(frozen=True)
class Spec:
    """What one option accepts.

    kinds: any of "bool", "int", "float", "str", "schedule"; tried in this order.
    int_min: the lowest integer.
    float_range: lowest and highest number; ``excluded`` takes ends out of it.
    choices: the words accepted, for options that accept words.
    optional: whether None is a value ("none" is, in a string).
    """

    kinds: tuple[str, ...]
    int_min: int = 0
    float_range: tuple[float, float] = (0.0, 1.0)
    excluded: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def valid(self) -> str:
        """The accepted values in words."""
        parts = []
        if "bool" in self.kinds:
            parts.append("True or False")
        if "int" in self.kinds:
            parts.append(f"an integer >= {self.int_min}")
        if "float" in self.kinds:
            low, high = self.float_range
            left = "(" if low in self.excluded else "["
            right = ")" if high in self.excluded or math.isinf(high) else "]"
            noun = "a fraction" if high == 1.0 else "a number"
            parts.append(f"{noun} in {left}{low:g}, {high:g}{right}")
        parts.extend(repr(choice) for choice in self.choices)
        if "str" in self.kinds and not self.choices:
            parts.append("a name")
        if "schedule" in self.kinds:
            parts.append(f"a schedule of such fractions, {EXAMPLES}")
        if self.optional:
            parts.append("None")
        return " or ".join(parts)


_COUNT_OR_FRACTION = Spec(("int", "float"), excluded=(1.0,))

SPECS: Mapping[str, Spec] = {
    "preset": Spec(("str",), optional=True),
    "top_p": Spec(("float",), optional=True),
    "density": Spec(("float", "str", "schedule"), excluded=(0.0,), choices=("auto",), optional=True),
    "target_error": Spec(("float",), excluded=(0.0, 1.0), optional=True),
    "measure_error": Spec(("bool",)),
    "min_k_ratio": Spec(("float",)),
    "num_q_clusters": Spec(("int",), int_min=1, optional=True),
    "num_k_clusters": Spec(("int",), int_min=1, optional=True),
    "init_iters": Spec(("int",), int_min=1),
    "step_iters": Spec(("int",), int_min=1),
    "dense_steps": Spec(("int", "float", "str"), excluded=(1.0,), choices=("auto",)),
    "dense_last_steps": _COUNT_OR_FRACTION,
    "dense_timesteps": Spec(("float",), optional=True),
    "dense_layers": Spec(("int", "float", "str"), excluded=(1.0,), choices=("auto",)),
    "min_tokens": Spec(("int", "str"), choices=("auto",)),
    "compensation": Spec(("str",), choices=("none", "centroid", "first_order")),
    "routing": Spec(("str",), choices=("auto", "score", "error")),
    "budget": Spec(("str",), choices=("auto", "row", "layer")),
    "balance_heads": Spec(("bool",)),
    "inner_backend": Spec(("str",)),
    "inductor_mode": Spec(("str",), optional=True),
    "strict": Spec(("bool",)),
    "collect_stats": Spec(("bool",)),
    "store_limit_mb": Spec(("float",), float_range=(0.0, math.inf), excluded=(0.0,)),
    "workspace_mb": Spec(("int",), int_min=1),
    "dump_dir": Spec(("str",), optional=True),
}


def canonical_names(options: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Resolve aliases: real name -> (the spelling that was used, value).

    Raises:
        ConfigError: for an unknown name, or one option under two spellings.
    """
    named: dict[str, tuple[str, Any]] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in SPECS:
            raise ConfigError(_unknown(given))
        if name in named:
            raise ConfigError(
                f"{named[name][0]!r} and {given!r} are two spellings of the option {name!r}. Valid: one of them."
            )
        named[name] = (given, value)
    return named


def _unknown(given: object) -> str:
    near = difflib.get_close_matches(str(given).lower(), [*SPECS, *ALIASES], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown option {given!r}.{hint} Valid: {', '.join(SPECS)}; also accepted: {', '.join(ALIASES)}."


def parse_value(name: str, value: Any, given_as: str | None = None) -> Any:
    """The value of the option ``name``, checked and of its own type.

    Args:
        name: a key of SPECS.
        value: a scalar, or a string that reads as one ("0.9", "true", "none").
        given_as: the spelling to use in an error.

    Raises:
        ConfigError: if the value has a wrong type or is out of range.
    """
    spec = SPECS[name]
    label = given_as or name
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy scalar
    if spec.optional and (value is None or (isinstance(value, str) and value.strip().lower() == "none")):
        return None
    for kind in spec.kinds:
        parsed = _PARSERS[kind](value, spec)
        if parsed is not None:
            return parsed
    raise ConfigError(f"{label}={value!r} is not valid. Valid: {spec.valid}.")


def _parse_bool(value: Any, spec: Spec) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return None


def _parse_int(value: Any, spec: Spec) -> int | None:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if value >= spec.int_min else None


def _parse_float(value: Any, spec: Spec) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if "int" in spec.kinds and isinstance(value, int):
        return None  # a count out of range must not pass as a fraction
    low, high = spec.float_range
    number = float(value)
    # An infinite or undefined number fails these comparisons or is_finite.
    return number if math.isfinite(number) and low <= number <= high and number not in spec.excluded else None


def _parse_str(value: Any, spec: Spec) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return None
    word = value.strip()
    if not spec.choices:
        return word
    return word.lower() if word.lower() in spec.choices else None


def _parse_schedule(value: Any, spec: Spec) -> str | None:
    schedule = DensitySchedule.read(value)
    return None if schedule is None else str(schedule)


_PARSERS = {
    "bool": _parse_bool,
    "int": _parse_int,
    "float": _parse_float,
    "str": _parse_str,
    "schedule": _parse_schedule,
}
