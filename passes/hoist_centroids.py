"""Make the centroids loop-carried: graph inputs instead of a cold start, and graph outputs for the next step.

Needs: a graph rewritten by sparsify, and its records.

Before (per side of a site; three nodes say "start cold, iterate long"):

    def forward(x):
        labels, centroids, sizes = svg2.kmeans(tokens, zeros, false, init_iters)
        ...
        return (y,)

After (the caller owns the state and says how far to iterate):

    def forward(x, svg2_0_query_state, ..., svg2_seeded, svg2_iters):
        labels, centroids, sizes = svg2.kmeans(tokens, svg2_0_query_state, svg2_seeded, svg2_iters)
        ...
        return (y, centroids, ..., density)

With ``budget_input`` the density that a layer's heads share becomes an input as well, behind the others: float32 [],
on the device, so that it may change from step to step without a new graph and without a host read. Where the density
follows an error (error_guard.py) every site has a budget of its own among the loop-carried tensors instead.

Guarantees: the graph is a pure function of its inputs; the original inputs and outputs keep their places, the new ones
follow them in the order of the StateSpec. No state is hidden in the graph and no constant depends on layer or step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from svg2_compile.passes.graph.values import find_fake_mode, metadata_key
from svg2_compile.passes.sparsify import Clustering, SparseSite

__all__ = ["BUDGET", "OrderSlot", "StateSlot", "StateSpec", "hoist_centroids"]

BUDGET = "svg2_budget"
"""The input that has the density, where heads share one that is given."""


@dataclass(frozen=True)
class StateSlot:
    """One loop-carried tensor: float32 centroids [B, H, C, D] (role "query" or "key"), or a budget [] ("budget").

    shape: ints, or sympy expressions over the symbols of the graph's own inputs. start: what fills it where nothing is
    carried.
    """

    site_index: int
    role: str
    name: str
    shape: tuple[Any, ...]
    start: float = 0.0


@dataclass(frozen=True)
class OrderSlot:
    """The order of one site's heads (see balance_heads): int64 [heads]."""

    site_index: int
    heads: int
    ranks: int
    group: str


@dataclass(frozen=True)
class StateSpec:
    """How the rewritten graph is called.

    Inputs:  the original ones, one tensor per slot, ``seeded`` (bool tensor []), ``iters`` (int), and with
             ``has_budget`` the density (float32 tensor []); then one order of heads (int64 [H]) per entry of orders.
    Outputs: the original ones, one tensor per slot, one density tensor [B, H] per entry of density_sites, and two
             tensors per entry of error_sites: the errors of the heads [B, H], and that of all together [].
    """

    slots: tuple[StateSlot, ...]
    density_sites: tuple[int, ...]
    num_inputs: int
    num_outputs: int
    device: torch.device
    has_budget: bool = False
    error_sites: tuple[int, ...] = ()
    orders: tuple[OrderSlot, ...] = ()


def hoist_centroids(gm: fx.GraphModule, sites: Sequence[SparseSite], budget_input: bool = False) -> StateSpec:
    """Replace every cold start of ``gm`` by a graph input, in place, and return how to call the result.

    budget_input: make the density an input too, where heads share one (``SparseSite.budget``).
    """
    graph = gm.graph
    clusterings = [(site, side) for site in sites for side in (site.query, site.key)]
    placeholders = _Placeholders(graph)
    num_inputs = placeholders.count
    device = _device_of(graph, clusterings[0][1])
    slots, carried = [], []
    for site, side in clusterings:
        state = placeholders.append(f"svg2_{site.site.index}_{side.role}_state", side.cold_centroids)
        side.kmeans.update_arg(1, state)
        slots.append(StateSlot(site.site.index, side.role, state.name, _shape_of(graph, state)))
        carried.append(side.centroids)
    for site in sites:
        if site.next_budget is not None and site.budget is not None:
            start = cast("float", site.budget.args[2])
            state = placeholders.append(f"svg2_{site.site.index}_budget_state", site.budget)
            _replace(graph, site.budget, state)
            slots.append(StateSlot(site.site.index, "budget", state.name, (), start))
            carried.append(site.next_budget)
    seeded = placeholders.append("svg2_seeded", clusterings[0][1].cold_flag)
    iters = placeholders.append_int("svg2_iters")
    shared = [site.budget for site in sites if site.budget is not None and site.next_budget is None]
    has_budget = budget_input and bool(shared)
    if has_budget:
        budget = placeholders.append(BUDGET, shared[0])
        for node in shared:
            _replace(graph, node, budget)
    orders = _hoist_orders(graph, placeholders, sites)
    for _, side in clusterings:
        side.kmeans.update_arg(2, seeded)
        side.kmeans.update_arg(3, iters)
        _erase_unused(graph, side.cold_centroids)
        _erase_unused(graph, side.cold_flag)

    densities = {site.site.index: site.density for site in sites if site.density is not None}
    errors = {site.site.index: (site.errors, site.error) for site in sites if site.errors and site.error}
    measured = [*densities.values(), *(node for pair in errors.values() for node in pair)]
    num_outputs = _append_outputs(graph, [*carried, *measured])
    graph.lint()
    gm.recompile()
    return StateSpec(
        *(tuple(slots), tuple(densities), num_inputs, num_outputs, device),
        has_budget=has_budget,
        error_sites=tuple(errors),
        orders=orders,
    )


def _replace(graph: fx.Graph, node: fx.Node, state: fx.Node) -> None:
    """Let an input take the place of a constant."""
    node.replace_all_uses_with(state)
    _erase_unused(graph, node)


def _hoist_orders(graph: fx.Graph, placeholders: _Placeholders, sites: Sequence[SparseSite]) -> tuple[OrderSlot, ...]:
    slots = []
    for site in sites:
        order = site.head_order
        if order is not None:
            index = site.site.index
            state = placeholders.append(f"svg2_{index}_order", order.node)
            _replace(graph, order.node, state)
            slots.append(OrderSlot(index, order.heads, order.ranks, order.group))
    return tuple(slots)


class _Placeholders:
    """Appends inputs behind the graph's own."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.key = metadata_key(graph)
        existing = graph.find_nodes(op="placeholder")
        self.count = len(existing)
        self._last = existing[-1]
        self._fake_mode = find_fake_mode(graph)

    def append(self, name: str, like: fx.Node) -> fx.Node:
        """A tensor input of the shape and dtype of the node that it will replace."""
        return self._append(name, like.meta[self.key])

    def append_int(self, name: str) -> fx.Node:
        """An integer input; symbolic, so that its value may change from call to call without a recompile."""
        hint = 2
        shape_env = self._fake_mode.shape_env if self._fake_mode is not None else None
        if shape_env is None:
            return self._append(name, hint)
        source = ConstantSource(name)
        symbol = shape_env.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
        return self._append(name, shape_env.create_symintnode(symbol, hint=hint, source=source))

    def _append(self, name: str, value: Any) -> fx.Node:
        with self.graph.inserting_after(self._last):
            node = self.graph.placeholder(name)
        node.meta[self.key] = value
        node._dynamo_source = ConstantSource(name)
        self._last = node
        return node


def _append_outputs(graph: fx.Graph, extra: list[fx.Node]) -> int:
    """Append ``extra`` to the graph's outputs; return how many there were before."""
    output = graph.output_node()
    original = output.args[0]
    if not isinstance(original, (tuple, list)):
        raise TypeError(f"hoist_centroids needs a graph that returns a tuple, got {type(original).__name__}")
    output.args = ((*original, *extra),)
    return len(original)


def _shape_of(graph: fx.Graph, state: fx.Node) -> tuple[Any, ...]:
    shape = state.meta[metadata_key(graph)].shape
    return tuple(extent if isinstance(extent, int) else extent.node.expr for extent in shape)


def _device_of(graph: fx.Graph, side: Clustering) -> torch.device:
    device = side.cold_centroids.meta[metadata_key(graph)].device
    assert isinstance(device, torch.device)
    return device


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that lost its users, and the size arithmetic that only it used."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if source.name.startswith("svg2_") or source.target is torch.ops.aten.sym_size.int:
            _erase_unused(graph, source)
