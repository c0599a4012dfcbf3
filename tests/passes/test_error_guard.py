"""A measured error, and the budget that follows it, in the graph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from svg2_compile.passes.error_guard import (
    GIVEN_UP,
    HIGHEST,
    LOWEST,
    density_of_budget,
    emit_density,
    emit_next_budget,
)
from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.hoist_centroids import StateSpec, hoist_centroids
from tests.passes.attention_graphs import KEEP_ALL, dynamo_graph, exported_graph, model_of, rewritten, sdpa, video

TARGET = 0.02
FOLLOWS = dataclasses.replace(
    KEEP_ALL, density=0.3, collect_stats=True, compensation="first_order", routing="error", budget="layer",
    target_error=TARGET,
)  # fmt: skip


def controller(target: float = TARGET) -> fx.GraphModule:
    """(budget, error) -> (density of this step, budget of the next)."""
    graph = fx.Graph()
    budget, error = (graph.placeholder(name) for name in ("budget", "error"))
    for node in (budget, error):
        node.meta["val"] = torch.zeros(())
    output = graph.output(None)
    build = GraphBuilder(graph, output)
    output.args = ((emit_density(build, budget), emit_next_budget(build, budget, error, target)),)
    return fx.GraphModule(torch.nn.Module(), graph)


def followed(law: Any, steps: int, begin: float = 0.1) -> tuple[list[float], list[float]]:
    """Densities and errors of some steps, where ``law`` gives the error of a density."""
    module, budget = controller(), torch.tensor(begin)
    densities, errors = [], []
    for _ in range(steps):
        density, _ = module(budget, torch.tensor(0.0))
        assert float(density) == pytest.approx(density_of_budget(float(budget)))
        densities.append(float(density))
        errors.append(law(float(density)))
        _, budget = module(budget, torch.tensor(errors[-1]))
    return densities, errors


@pytest.mark.parametrize("scale", [0.004, 0.0008, 0.011])
@pytest.mark.parametrize("exponent", [0.4, 0.73, 1.5])
def test_it_comes_to_the_target_within_a_few_steps(scale: float, exponent: float) -> None:
    densities, errors = followed(lambda density: scale * density**-exponent, 12)
    wanted = (scale / TARGET) ** (1 / exponent)
    if LOWEST < wanted < HIGHEST:
        assert errors[-1] == pytest.approx(TARGET, rel=0.1)
    elif wanted <= LOWEST:
        assert densities[-1] == pytest.approx(LOWEST)
    assert all(1 / 2.001 < after / before < 2.001 for before, after in itertools.pairwise(densities))


def test_what_cannot_be_met_is_computed_exactly_and_stays_so() -> None:
    densities, _ = followed(lambda density: 0.0 if density == 1 else 0.05, 12)
    assert densities[:5] == pytest.approx([0.1, 0.2, 0.4, HIGHEST, HIGHEST])
    assert densities[5:] == [1.0] * 7
    barely, _ = followed(lambda density: 1.1 * TARGET, 14, begin=HIGHEST)
    assert barely == [HIGHEST] * 14  # a target that is missed by little is missed for long


def test_unknown_errors_change_nothing() -> None:
    module = controller()
    for budget in (0.1, GIVEN_UP):
        assert module(torch.tensor(budget), torch.tensor(math.nan))[1] == torch.tensor(budget)
    assert module(torch.tensor(0.1), torch.tensor(math.inf))[1] == pytest.approx(0.2)


def hoisted(kind: Any = dynamo_graph) -> tuple[fx.GraphModule, StateSpec, list[Tensor]]:
    gm, inputs = kind(model_of(sdpa), video(2, 60))
    copied, sites = rewritten(gm, FOLLOWS)
    return copied, hoist_centroids(copied, sites, budget_input=True), inputs


@pytest.mark.parametrize("kind", [dynamo_graph, functools.partial(exported_graph, decomposed=False)])
def test_every_attention_has_a_budget_among_its_state(kind: Any) -> None:
    gm, spec, inputs = hoisted(kind)
    assert [(slot.role, slot.name, slot.shape, slot.start) for slot in spec.slots][-1] == (
        "budget", "svg2_0_budget_state", (), 0.3,
    )  # fmt: skip
    assert not spec.has_budget and spec.error_sites == spec.density_sites == (0,)
    state = [torch.full(slot.shape, slot.start) for slot in spec.slots]
    out, *rest = gm(*inputs, *state, torch.tensor(False), 3)
    query, key, budget, densities, errors, error = rest
    assert out.shape == inputs[-1].shape or out.dim() == 3
    assert densities.shape == errors.shape == (2, 2) and error.shape == budget.shape == ()
    factor = min(max(float(error.detach()) / TARGET, 0.5), 2.0)
    assert float(budget) == pytest.approx(0.3 * factor)
    # A budget that was given up computes everything: no error is left.
    *_, budget, densities, _, error = gm(*inputs, query, key, torch.tensor(GIVEN_UP), torch.tensor(True), 1)
    assert float(budget) == GIVEN_UP and densities.eq(1).all() and float(error) < 1e-5


def test_a_measurement_alone_adds_no_state() -> None:
    gm, inputs = dynamo_graph(model_of(sdpa), video(2, 60))
    for policy in (
        dataclasses.replace(FOLLOWS, target_error=None, measure_error=True),
        dataclasses.replace(KEEP_ALL, measure_error=True),
    ):
        copied, sites = rewritten(gm, policy)
        spec = hoist_centroids(copied, sites, budget_input=True)
        assert [slot.role for slot in spec.slots] == ["query", "key"] and spec.error_sites == (0,)
        budget = [torch.tensor(0.3)] if spec.has_budget else []
        state = [torch.zeros(slot.shape) for slot in spec.slots]
        *_, errors, error = copied(*inputs, *state, torch.tensor(False), 3, *budget)
        assert errors.shape == (2, 2) and 0 <= float(error) < 1
        assert (float(error) < 1e-5) == (policy.budget == "row")  # KEEP_ALL keeps all
