"""Rewrite: a graph with symbolic sizes becomes one for the sizes that it was traced with.

Where the algebra of symbolic lengths cannot show where the tokens come from, numbers can:

    x[:, :length] with `length` an int of its own beside x: [B, s0, C]     ->  unknown: is length s0, or less?
    the same graph at length = 480, s0 = 504                               ->  the first 480 of 504 tokens

Needs: the layouts of token_layout(..., concrete=True), decisions made with them. Guarantees: every symbol of the inputs
has a guard for its number (another size is another graph), and a graph that cannot be guarded so is left alone.

`guard_signs` is for graphs that stay symbolic: an int that the model was called with is taken for a size, which is not
negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from svg2_compile.passes.graph.sizes import traced_sizes
from svg2_compile.passes.graph.values import find_fake_mode, node_value
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.sites import Site, Skip

__all__ = ["can_specialise", "guard_signs", "negative_sizes", "sizes_of", "specialise", "with_numbers"]


def can_specialise(gm: fx.GraphModule) -> bool:
    """Whether the graph has symbolic sizes, all of them known from its inputs, that a guard may fix.

    Only Dynamo guards its graphs. Sizes that the user declared dynamic must stay so.
    """
    shape_env = _shape_env(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if shape_env is None or shape_env.frozen or not any(hasattr(node, "_dynamo_source") for node in placeholders):
        return False
    symbols = _symbols_of(gm.graph.nodes)
    return bool(symbols) and symbols <= traced_sizes(shape_env).keys() and not _declared(shape_env)


def specialise(gm: fx.GraphModule) -> None:
    """Guard every symbol of the inputs to be the number that was traced."""
    shape_env = _shape_env(gm)
    assert shape_env is not None
    known = traced_sizes(shape_env)
    for symbol in sorted(_symbols_of(gm.graph.nodes), key=str):
        shape_env.evaluate_expr(sympy.Eq(symbol, known[symbol]))


def guard_signs(gm: fx.GraphModule) -> None:
    """Guard the ints among the inputs not to be negative, where nothing else has."""
    shape_env = _shape_env(gm)
    if shape_env is None or shape_env.frozen:
        return
    known = traced_sizes(shape_env)
    for symbol in _unproven_signs(gm, shape_env):
        if symbol in known:
            shape_env.evaluate_expr(sympy.Ge(symbol, 0))


def negative_sizes(gm: fx.GraphModule) -> bool:
    """Whether some int of the graph is negative, or may be and no guard can tell."""
    shape_env = _shape_env(gm)
    if shape_env is None:
        return False
    known = traced_sizes(shape_env)
    unproven = _unproven_signs(gm, shape_env)
    return any(known[s] < 0 if s in known else _is_used_as_size(s, gm) for s in unproven)


def sizes_of(gm: fx.GraphModule) -> dict[sympy.Symbol, Any]:
    """The number that every symbol of the graph was traced with."""
    return traced_sizes(_shape_env(gm))


def with_numbers(decisions: Sequence[Site | Skip], gm: fx.GraphModule) -> list[Site | Skip]:
    """The decisions with the sizes that were traced in the place of symbols."""
    known = sizes_of(gm)
    names = ["batch", "num_heads", "num_kv_heads", "num_tokens", "video_start", "video_tokens"]
    names += ["num_q_clusters", "num_k_clusters", "context_tokens"]

    def numbered(decision: Site | Skip) -> Site | Skip:
        values = {name: getattr(decision, name, None) for name in names}
        numbers: dict[str, Any] = {
            name: known_number(value, known) for name, value in values.items() if isinstance(value, sympy.Expr)
        }
        if isinstance(decision, Site):
            parts = decision.video_parts
            numbers["worth"] = None
            numbers["video_parts"] = tuple((known_number(a, known), known_number(b, known)) for a, b in parts)
        return replace(decision, **numbers)

    return [numbered(decision) for decision in decisions]


def _shape_env(gm: fx.GraphModule) -> ShapeEnv | None:
    mode = find_fake_mode(gm.graph)
    return None if mode is None else mode.shape_env


def _symbols_of(nodes: Iterable[fx.Node]) -> set[sympy.Symbol]:
    """The symbols of all sizes."""
    found: set[sympy.Symbol] = set()
    for node in nodes:
        value = node_value(node)
        sizes = list(value.shape) if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found |= size.node.expr.free_symbols
    return found


def _unproven_signs(gm: fx.GraphModule, shape_env: ShapeEnv) -> list[sympy.Symbol]:
    ranges = shape_env.var_to_range
    symbols = sorted(_symbols_of(gm.graph.nodes), key=str)
    return [symbol for symbol in symbols if not (symbol in ranges and ranges[symbol].lower >= 0)]


def _is_used_as_size(symbol: sympy.Symbol, gm: fx.GraphModule) -> bool:
    """Whether a number that depends on data is part of the size of a tensor."""
    tensors = [node for node in gm.graph.nodes if isinstance(node_value(node), torch.Tensor)]
    return symbol in _symbols_of(tensors)


def _declared(shape_env: ShapeEnv) -> bool:
    """Whether the user declared some size dynamic (mark_dynamic): fixing it would be an error of his call."""
    contexts = [getattr(fake, "symbolic_context", None) for fake in shape_env.tracked_fakes or ()]
    constraints = [c for context in contexts for c in getattr(context, "constraint_sizes", ()) or ()]
    # Dynamo's own, of automatic dynamic shapes, only warn.
    return any(constraint is not None and not constraint.warn_only for constraint in constraints)
