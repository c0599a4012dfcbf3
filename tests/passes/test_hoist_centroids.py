"""State as inputs and outputs: a pure function that a caller can iterate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from svg2_compile.passes.hoist_centroids import hoist_centroids
from tests.passes.attention_graphs import KEEP_ALL, dynamo_graph, model_of, rewritten, sdpa, video

SELECT = dataclasses.replace(KEEP_ALL, top_p=0.5, collect_stats=True, init_iters=4)


def _hoisted(tokens=60, **compile_options):
    gm, inputs = dynamo_graph(model_of(sdpa), video(2, tokens), **compile_options)
    cold, _ = rewritten(gm, SELECT)
    hoisted, sites = rewritten(gm, SELECT)
    return gm, cold, hoisted, hoist_centroids(hoisted, sites), inputs


def _zeros(spec):
    return [torch.zeros(slot.shape) for slot in spec.slots]


def test_the_specification_describes_the_graph():
    gm, _, hoisted, spec, inputs = _hoisted()
    names = [node.name for node in hoisted.graph.find_nodes(op="placeholder")]
    assert names[spec.num_inputs :] == ["svg2_0_query_state", "svg2_0_key_state", "svg2_seeded", "svg2_iters"]
    assert names[: spec.num_inputs] == [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert [(slot.site_index, slot.role, slot.shape) for slot in spec.slots] == [
        (0, "query", (2, 2, 3, 8)),
        (0, "key", (2, 2, 5, 8)),
    ]
    outputs = hoisted(*inputs, *_zeros(spec), torch.tensor(False), 4)
    assert len(outputs) == spec.num_outputs + len(spec.slots) + len(spec.density_sites) == 1 + 2 + 1
    assert [tuple(state.shape) for state in outputs[1:3]] == [slot.shape for slot in spec.slots]


def test_unseeded_it_equals_the_cold_graph():
    _, cold, hoisted, spec, inputs = _hoisted()
    expected = cold(*inputs)[0]
    for garbage in (0.0, 1e9, float("nan")):
        states = [torch.full_like(state, garbage) for state in _zeros(spec)]
        assert torch.equal(hoisted(*inputs, *states, torch.tensor(False), SELECT.init_iters)[0], expected)


def test_two_and_two_iterations_are_four():
    _, _, hoisted, spec, inputs = _hoisted()
    at_once = hoisted(*inputs, *_zeros(spec), torch.tensor(False), 4)
    half = hoisted(*inputs, *_zeros(spec), torch.tensor(False), 2)
    rest = hoisted(*inputs, *half[1:3], torch.tensor(True), 2)
    for one, other in zip(at_once, rest, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_inputs_are_not_changed():
    _, _, hoisted, spec, inputs = _hoisted()
    states = [torch.randn(slot.shape) for slot in spec.slots]
    before = [state.clone() for state in states]
    outputs = hoisted(*inputs, *states, torch.tensor(True), 2)
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
    assert {o.data_ptr() for o in outputs}.isdisjoint(s.data_ptr() for s in states)


def test_iterations_change_without_a_recompile():
    compiled_graphs = []

    def backend(gm, examples):
        from svg2_compile.codegen.inner_backend import compile_inner

        cold, sites = rewritten(gm, SELECT)
        spec = hoist_centroids(cold, sites)
        extra = [n.meta["example_value"] for n in cold.graph.find_nodes(op="placeholder")][len(examples) :]
        run = compile_inner(cold, [*examples, *extra], "inductor")
        compiled_graphs.append(spec)
        return lambda *args: run(*args, *_zeros(spec), torch.tensor(False), iters[0])[: spec.num_outputs]

    iters = [2]
    with torch.no_grad():
        model = model_of(sdpa)
        compiled = torch.compile(model, backend=backend)
        first = compiled(video(2, 60))
        iters[0] = 9
        second = compiled(video(2, 60))
    assert len(compiled_graphs) == 1
    assert not torch.equal(first, second)


def test_symbolic_state():
    gm, inputs = dynamo_graph(model_of(sdpa), video(2, 21), dynamic=True)
    hoisted, sites = rewritten(gm, SELECT)
    spec = hoist_centroids(hoisted, sites)
    shape = spec.slots[0].shape
    # The batch is a symbol, and three clusters are three only where there are as many tokens.
    assert not isinstance(shape[0], int) and (shape[1], shape[3]) == (2, 8)
    (tokens,) = shape[2].free_symbols
    assert [shape[2].subs(tokens, count) for count in (2, 21)] == [2, 3]
    # The size arithmetic that only the cold start needed is gone.
    assert not any("cold" in node.name for node in hoisted.graph.nodes)
    states = [torch.zeros(2, 2, count, 8) for count in (3, 5)]
    assert hoisted(*inputs, *states, torch.tensor(False), 2)[1].shape == (2, 2, 3, 8)


def test_a_graph_that_returns_no_tuple_is_refused():
    gm, _ = dynamo_graph(model_of(sdpa), video())
    copied, sites = rewritten(gm, SELECT)
    output = copied.graph.output_node()
    output.args = (output.args[0][0],)
    with pytest.raises(TypeError, match="returns a tuple"):
        hoist_centroids(copied, sites)


POOLED = dataclasses.replace(
    SELECT, compensation="first_order", routing="error", budget="layer", density=0.3, collect_stats=True
)


def test_the_density_becomes_an_input_that_changes_from_call_to_call():
    gm, inputs = dynamo_graph(model_of(sdpa), video(2, 60))
    hoisted, sites = rewritten(gm, POOLED)
    spec = hoist_centroids(hoisted, sites, budget_input=True)
    assert spec.has_budget
    names = [node.name for node in hoisted.graph.find_nodes(op="placeholder")]
    assert names[-3:] == ["svg2_seeded", "svg2_iters", "svg2_budget"]
    assert not [node for node in hoisted.graph.nodes if node.name.endswith("_budget") and node.op != "placeholder"]
    densities = []
    for density in (0.0, 0.3, 0.6, 1.0):
        outputs = hoisted(*inputs, *_zeros(spec), torch.tensor(False), 4, torch.tensor(density))
        densities.append(float(outputs[-1].mean()))
    assert densities == sorted(densities) and densities[0] == 0 and densities[-1] == 1
    torch.testing.assert_close(outputs[0], gm(*inputs)[0], rtol=1e-4, atol=1e-5)


def test_the_density_stays_a_constant_unless_asked_for():
    gm, inputs = dynamo_graph(model_of(sdpa), video(2, 60))
    hoisted, sites = rewritten(gm, POOLED)
    spec = hoist_centroids(hoisted, sites)
    assert not spec.has_budget
    density = hoisted(*inputs, *_zeros(spec), torch.tensor(False), 4)[-1]
    assert abs(float(density.mean()) - 0.3) < 0.1
