"""Which steps and which layers stay dense.

Steps: ``dense_steps`` counts from the first step that runs, ``dense_last_steps`` from the last; a fraction is one of
the steps that run. ``dense_timesteps`` is a fraction of the timestep's range instead, as in the SVG2 scripts.

Layers: ``dense_layers`` counts attentions over the video in the order in which the model computes them. It is decided
once for a model, whether its layers are one graph, one graph each, or pieces between graph breaks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from svg2_compile.logs.logger import Once
from svg2_compile.passes.sites import dense_layer_count
from svg2_compile.runtime.standing import Standing
from svg2_compile.settings.config import Svg2Config

__all__ = ["ASSUMED_STEPS", "DenseLayers", "dense_step_count", "dense_step_reason"]

# Of a schedule of which nothing is known. Two dense steps by the default: half of what the shortest schedules have.
ASSUMED_STEPS = 10


def dense_step_count(dense_steps: int | float, num_steps: int) -> int:
    """The number of dense steps of ``num_steps``: a count, or a fraction rounded up."""
    if isinstance(dense_steps, int):
        return dense_steps
    return math.ceil(dense_steps * num_steps - 1e-9)


def dense_step_reason(config: Svg2Config, standing: Standing, once: Once) -> str | None:
    """Why the step of a call stays dense: the name of the option that says so; None if it does not."""
    if _is_first(config.dense_steps, standing, once):
        return "dense_steps"
    if config.dense_last_steps and _is_last(config.dense_last_steps, standing, once):
        return "dense_last_steps"
    if config.dense_timesteps is not None and _is_noisy(config.dense_timesteps, standing, once):
        return "dense_timesteps"
    return None


def _is_first(dense_steps: int | float, standing: Standing, once: Once) -> bool:
    if isinstance(dense_steps, int):
        return standing.step < dense_steps
    if dense_steps == 0.0:
        return False
    if standing.num_steps is not None:
        return standing.step < dense_step_count(dense_steps, standing.num_steps)
    if standing.estimated_steps is not None:
        return standing.step < dense_step_count(dense_steps, standing.estimated_steps)
    if standing.progress is None:
        count = dense_step_count(dense_steps, ASSUMED_STEPS)
        once.warning(
            "unknown_schedule",
            "neither the length of the schedule nor the timestep is known: for dense_steps=%s the first %d steps stay "
            "dense, as of %d. svg2_compile.denoising(step=..., num_steps=...) or svg2_compile.enable(pipe) tells the "
            "length; an integer counts steps.",
            *(dense_steps, count, ASSUMED_STEPS),
        )
        return standing.step < count
    once.warning(
        "unknown_schedule",
        "the length of the schedule is unknown: dense_steps=%s is taken as a fraction of the timestep's range until "
        "the spacing of the timesteps tells more. svg2_compile.enable(pipe) or svg2_compile.denoising(num_steps=...) "
        "tells it; an integer counts steps.",
        dense_steps,
    )
    return standing.progress < dense_steps


def _is_last(dense_last_steps: int | float, standing: Standing, once: Once) -> bool:
    if standing.num_steps is not None:
        return standing.step >= standing.num_steps - dense_step_count(dense_last_steps, standing.num_steps)
    once.warning(
        "unknown_end",
        "dense_last_steps=%s has no effect: nobody tells how many steps run. svg2_compile.enable(pipe) or "
        "svg2_compile.denoising(num_steps=...) does.",
        dense_last_steps,
    )
    return False


def _is_noisy(dense_timesteps: float, standing: Standing, once: Once) -> bool:
    if standing.timestep is None:
        once.warning(
            "no_timestep_value",
            "dense_timesteps=%s has no effect: no input tells the timestep. An integer for dense_steps counts steps.",
            dense_timesteps,
        )
        return False
    highest = 1000.0 if standing.timestep > 1.0 else 1.0
    return standing.timestep > highest * (1.0 - dense_timesteps)


class DenseLayers:
    """The decision which layers of a model stay dense, made once.

    A graph of several layers decides when it is compiled, with those before it counted; a graph that serves one layer
    at a time decides at every call. A fraction is one of the layers of the model: ``expected`` of them, as long as not
    all were seen.

    Args:
        dense_layers: a count, or a fraction.
        expected: how many layers the model has as far as its modules tell; None if nobody knows.
    """

    def __init__(self, dense_layers: int | float, expected: int | None = None) -> None:
        self._dense_layers = dense_layers
        self._expected = expected or 0
        self._ordinals: dict[Hashable, int] = {}
        self._count: int | None = None
        self.names: list[str] = []

    def of_graph(self, names: Sequence[str]) -> int:
        """How many of the first attentions of a graph of several layers stay dense. Asked when it is compiled.

        names: of its attentions over the video, in order; a graph that is compiled again has the same.
        """
        ordinals = [self._ordinal(name) for name in names]
        limit = self._so_far()
        return sum(ordinal < limit for ordinal in ordinals)

    def of_layer(self, layer: Hashable, name: str) -> bool:
        """Whether a layer that has its graph for itself stays dense. Asked at every call."""
        dense = self._ordinal(name or layer) < self._so_far()
        if dense and name and name not in self.names:
            self.names.append(name)
        return dense

    def _ordinal(self, place: Hashable) -> int:
        return self._ordinals.setdefault(place, len(self._ordinals))

    def settle(self) -> None:
        """A call of the model is over: all of its layers were seen."""
        if self._count is None and self._ordinals:
            self._count = dense_layer_count(self._dense_layers, len(self._ordinals))

    def _so_far(self) -> int:
        if self._count is not None:
            return self._count
        return dense_layer_count(self._dense_layers, max(len(self._ordinals), self._expected))
