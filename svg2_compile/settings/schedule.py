"""A density that changes from step to step, as text: "0.3..0.05" falls evenly, "0.4, 0.2, 0.1" says every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DensitySchedule"]

EXAMPLES = "'0.3..0.05' (from the first to the last sparse step) or '0.4, 0.2, 0.1' (step by step, the last one stays)"


@dataclass(frozen=True)
class DensitySchedule:
    """Densities over the sparse steps of a video; dense steps at its start and end are not among them.

    values: each in (0, 1]. is_ramp: two values, the first and the last step's, with even differences between them;
    otherwise one value a step, of which the last stays.
    """

    values: tuple[float, ...]
    is_ramp: bool

    @classmethod
    def read(cls, value: Any) -> DensitySchedule | None:
        """The schedule that a text or a sequence of numbers spells; None where it spells none."""
        is_ramp = isinstance(value, str) and value.count("..") == 1
        if isinstance(value, str):
            parts: Sequence[Any] = value.split("..") if is_ramp else value.strip().strip("[]").split(",")
        elif isinstance(value, (list, tuple)):
            parts = value
        else:
            return None
        numbers = [_density(part) for part in parts]
        found = tuple(number for number in numbers if number is not None)
        return cls(found, is_ramp) if len(found) == len(numbers) and len(found) > 1 else None

    def __str__(self) -> str:
        return (".." if self.is_ramp else ", ").join(f"{value:g}" for value in self.values)

    @property
    def mean(self) -> float:
        """Of a ramp over its steps; of a list over its entries."""
        return math.fsum(self.values) / len(self.values)

    def at(self, index: int, count: int) -> float:
        """The density of sparse step ``index`` of ``count``; a list does not look at ``count``."""
        if not self.is_ramp:
            return self.values[min(index, len(self.values) - 1)]
        first, last = self.values
        passed = min(index / (count - 1), 1.0) if count > 1 else 0.0
        return first + (last - first) * passed


def _density(value: Any) -> float | None:
    """A number in (0, 1], or a text that reads as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0.0 < number <= 1.0 else None
