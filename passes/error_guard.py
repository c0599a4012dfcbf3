"""Emits what watches an attention: the error of a few exact rows, and the density of the next step that follows it.

    errors, error = svg2.sampled_error(query, key, value, out, ...)

With a target the budget of an attention becomes a state, float32 [], which the next step begins with:

    is_given_up = budget >= 2
    density = where(is_given_up, 1, clamp(budget, 0.02, 0.5))
    ... the attention with this density, and its error ...
    next_budget = where(is_given_up, budget, clamp(budget * clamp(error / target, 1/2, 2), 0.02, 2))

A step along log(error / target), at most by a factor of two. (Errors fall with about density^-0.7: one such step makes
up for two thirds of what is missing.) Above the highest density the budget goes on growing, and so says for how long
and how far the target was missed: at four times the highest density it is given up, and the attention computes
everything exactly from then on.
"""

from __future__ import annotations

import torch
from torch import fx

from svg2_compile.passes.graph.builder import GraphBuilder

__all__ = [
    "GIVEN_UP",
    "HIGHEST",
    "LOWEST",
    "ROWS",
    "density_of_budget",
    "emit_density",
    "emit_next_budget",
    "emit_sampled_error",
]

ROWS = 32
"""Of every head: 1 % of the attention at 4,096 tokens, less than 0.1 % at 75,600."""
LOWEST, HIGHEST = 0.02, 0.5
GIVEN_UP = 4 * HIGHEST
LARGEST_STEP = 2.0

_aten = torch.ops.aten


def density_of_budget(budget: float) -> float:
    """The density that an attention has with this budget: what :func:`emit_density` emits, for reports."""
    return 1.0 if budget >= GIVEN_UP else min(max(budget, LOWEST), HIGHEST)


def emit_density(build: GraphBuilder, budget: fx.Node) -> fx.Node:
    """The density of a step from its budget, both float32 []."""
    within = build.call(_aten.clamp.default, budget, LOWEST, HIGHEST, name="budget_within")
    given_up = build.call(_aten.ge.Scalar, budget, GIVEN_UP, name="budget_given_up")
    return build.call(_aten.masked_fill.Scalar, within, given_up, 1.0, name="density_asked")


def emit_sampled_error(build: GraphBuilder, *arguments: fx.Node, scale: float) -> tuple[fx.Node, ...]:
    """Relative errors of the heads [B, H] and of all together []; arguments: those of the operator before the scale."""
    sampled = build.call(torch.ops.svg2.sampled_error.default, *arguments, scale, ROWS, name="sampled")
    return build.unpack(sampled, ["errors", "error"])


def emit_next_budget(build: GraphBuilder, budget: fx.Node, error: fx.Node, target: float) -> fx.Node:
    """The budget of the next step, float32 []. An error of NaN changes nothing: the result is lost anyway."""
    excess = build.call(_aten.div.Scalar, error, target, name="error_excess")
    excess = build.call(_aten.nan_to_num.default, excess, 1.0, name="error_excess_known")
    factor = build.call(_aten.clamp.default, excess, 1 / LARGEST_STEP, LARGEST_STEP, name="budget_factor")
    moved = build.call(_aten.mul.Tensor, budget, factor, name="budget_moved")
    within = build.call(_aten.clamp.default, moved, LOWEST, GIVEN_UP, name="budget_moved_within")
    given_up = build.call(_aten.ge.Scalar, budget, GIVEN_UP, name="budget_was_given_up")
    return build.call(_aten.where.self, given_up, budget, within, name="budget_next")
