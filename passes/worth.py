"""Whether an attention is long enough to gain from becoming sparse, asked at any size.

    900 video tokens, min_tokens=1       ->  the predicted speedup
    900 video tokens, min_tokens="auto"  ->  StaysDense("cost"), where the cost model predicts no gain
    s0 * s1 video tokens                 ->  one or the other at s0 = 8, s1 = 1560

Knows no graph. What depends on data passes for an integer min_tokens, and stays dense for "auto".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch.utils._sympy.value_ranges import bound_sympy

from svg2_compile.passes.cost_model import CostInputs, crossover_tokens, speedup
from svg2_compile.passes.device_profile import REFERENCE, DeviceProfile
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.stays_dense import StaysDense

__all__ = ["Sizes", "Worth"]

Sizes = Mapping[sympy.Symbol, Any]
"""The number that every symbol is."""


@dataclass(frozen=True)
class Worth:
    """The question whether an attention is long enough, for sizes that another call may change.

    cost: of CostInputs; its sizes are ints, or sympy expressions over the sizes of the graph's inputs.
    min_tokens: as of SitePolicy. profile: of the device.
    """

    cost: CostInputs
    min_tokens: int | str
    profile: DeviceProfile

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """What the answer depends on."""
        sizes = [self.cost.video] if isinstance(self.min_tokens, int) else vars(self.cost).values()
        return frozenset().union(*(size.free_symbols for size in sizes if _is_symbolic(size)))

    def at(self, sizes: Sizes) -> CostInputs | None:
        """The attention at these sizes; None where one is missing or is no whole number."""
        numbers: dict[str, Any] = {
            name: known_number(size, sizes) for name, size in vars(self.cost).items() if _is_symbolic(size)
        }
        return None if None in numbers.values() else replace(self.cost, **numbers)

    def gain(self, sizes: Sizes) -> float | None:
        """The predicted speedup at these sizes; None where they are not known.

        Raises:
            StaysDense: too short to gain, or too short for min_tokens.
        """
        cost = self.at(sizes)
        if isinstance(self.min_tokens, int):
            video = known_number(self.cost.video, sizes)
            if video is not None and video < self.min_tokens:
                raise StaysDense("short_sequence", f"{video} video tokens, fewer than min_tokens={self.min_tokens}")
            if video == 0:
                raise StaysDense("short_sequence", "no video tokens")
        if cost is None:
            if self.min_tokens == "auto":
                raise StaysDense("cost", "the size depends on data: give min_tokens as an integer to make it sparse")
            return None
        gain = float(speedup(cost, self.profile)) if cost.groups and cost.video else 0.0
        if self.min_tokens == "auto":
            _check_gain(cost, self.profile, gain)
        return gain

    def may_change(self, traced: Sizes, ranges: Mapping[sympy.Symbol, Any]) -> bool:
        """Whether other sizes within ``ranges`` may have another answer than those that were traced."""
        if not self.symbols:
            return False
        if self.min_tokens == "auto":
            cost = self.at(traced)
            if self.profile is REFERENCE or cost is None:
                return False
            return not cost.groups or crossover_tokens(cost, self.profile) is not None
        bounds = bound_sympy(self.cost.video, {s: r for s, r in ranges.items() if s in self.cost.video.free_symbols})
        return bool(bounds.lower < max(self.min_tokens, 1) <= bounds.upper)


def _check_gain(cost: CostInputs, profile: DeviceProfile, gain: float) -> None:
    if profile is REFERENCE:
        raise StaysDense("cost", "no fast kernels for this device: min_tokens=<int> runs the slow reference")
    if gain <= 1.0:
        crossover = crossover_tokens(cost, profile) if cost.groups else None
        where = f"from about {crossover} tokens on" if crossover else "at no length"
        raise StaysDense(
            "cost",
            f"{cost.video} video tokens: sparse attention is expected to gain on {profile.name} {where} "
            f"(expected density {cost.density:.0%}); min_tokens=<int> overrides this",
            predicted_speedup=gain,
            expected_density=cost.density,
        )


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, sympy.Expr) and bool(size.free_symbols)
