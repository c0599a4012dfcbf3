"""Analysis: which inputs of a graph tell that a denoising step is over.

In a whole model the timestep reaches a sine/cosine embedding:

    timestep [B] -> mul -> sin, cos -> linear -> ...

A block compiled alone sees only tensors that are made from the timestep (modulation, `temb`): floating-point inputs
that shift and scale all tokens alike, so that their positions are on no attention's token axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.token_layout import TokenLayouts

_PERIODIC = frozenset({"sin", "cos", "sin_", "cos_", "sincos", "polar"})
_LARGEST_TIMESTEP_RANK = 2
"""[] or [B], or [B, N] where every token has a timestep of its own."""


@dataclass(frozen=True, slots=True)
class TimeInput:
    """An input by which the run time may see a new step.

    `kind`: "timestep" = its values embed as sines and cosines; "modulation" = made from the timestep elsewhere.
    `per_token`: its positions are on an attention's token axis (one value for every token).
    """

    name: str
    kind: Literal["timestep", "modulation"]
    per_token: bool


def modulation_inputs(layouts: TokenLayouts, gm: fx.GraphModule) -> tuple[TimeInput, ...]:
    """The inputs that depend on the denoising step, in the order of the graph's placeholders; empty if none is found.

    Timesteps if there are any: of those only the ones with one value for all tokens, unless all have one for every
    token (position ids of a rotary embedding reach a sine too). Otherwise the modulation tensors. A guidance scale is
    a candidate as well: whoever watches values must take the input that changes.
    """
    placeholders = [node for node in gm.graph.find_nodes(op="placeholder") if node.name in layouts.inputs]
    on_tokens = _sources_on_token_axes(layouts)
    periodic = _ancestors_of_periodic_nodes(gm)
    timesteps = [
        TimeInput(node.name, "timestep", node.name in on_tokens)
        for node in placeholders
        if node in periodic and node.name not in layouts.latent and _may_be_timestep(node)
    ]
    if timesteps:
        return tuple([t for t in timesteps if not t.per_token] or timesteps)
    if not layouts.attentions:
        return ()
    return tuple(
        TimeInput(node.name, "modulation", False)
        for node in placeholders
        if node.name not in on_tokens and node.name not in layouts.latent and _is_float_tensor(node)
    )


def _sources_on_token_axes(layouts: TokenLayouts) -> frozenset[str]:
    found: set[str] = set()
    for attention in layouts.attentions:
        found |= attention.query.sources | attention.key.sources | attention.mask_sources
    return frozenset(found)


def _ancestors_of_periodic_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """Every node whose values (not only whose sizes) reach a sine or a cosine."""
    graph = nx.DiGraph()
    graph.add_nodes_from(gm.graph.nodes)
    for node in gm.graph.nodes:
        graph.add_edges_from((source, node) for source in node.all_input_nodes if not _is_size(source))
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and operator_name(node) in _PERIODIC:
            found |= nx.ancestors(graph, node)
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node_value(node), (int, torch.SymInt)) and not isinstance(node_value(node), bool)


def _may_be_timestep(node: fx.Node) -> bool:
    value = node_value(node)
    if isinstance(value, torch.Tensor):
        return value.dim() <= _LARGEST_TIMESTEP_RANK and value.dtype != torch.bool and not value.dtype.is_complex
    return isinstance(value, (float, torch.SymFloat))


def _is_float_tensor(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
