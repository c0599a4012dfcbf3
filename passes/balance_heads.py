"""Rewrite: which heads go to which rank of Ulysses becomes a choice, made at run time.

Needs: sites from decide_sites on this very graph, before sparsify; fake metadata on its nodes.

Before (of H heads, rank r gets the r-th H / W; `exchange` is reshape, permute, all_to_all_single and back):

    query, key, value = exchange(query), exchange(key), exchange(value)         [B, N / W, H, D] -> [B, N, H / W, D]
    out = exchange_back(attention(query, key, value))                           [B, N, H / W, D] -> [B, N / W, H, D]

After (until hoist_centroids makes the order an input, it is that of before):

    order = arange(H);  back = argsort(order)
    query, key, value = exchange(query[:, :, order]), exchange(key[:, :, order]), exchange(value[:, :, order])
    out = exchange_back(attention(query, key, value))[:, :, back]

Guarantees: attention knows no order of heads, so that the graph computes the same for every order; collectives keep
their number and order. A site whose exchange is not spelled as diffusers does, or whose mask differs between heads, is
left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.graph.collectives import RankGroup, rank_groups
from svg2_compile.passes.graph.nodes import operator_name, shape_of
from svg2_compile.passes.sites import Site

__all__ = ["HeadOrder", "balance_heads"]

_aten = torch.ops.aten
_PLAIN = frozenset({"contiguous", "flatten", "reshape", "view", "wait_tensor", "clone", "_unsafe_view", "unflatten"})
_MOVES = frozenset({"permute", "transpose"})


@dataclass(frozen=True)
class HeadOrder:
    """The heads of one site: ``node`` yields int64 [heads], whose r-th part of ``ranks`` equal ones is rank r's."""

    node: fx.Node
    heads: int
    ranks: int
    group: str


def balance_heads(gm: fx.GraphModule, sites: Sequence[Site]) -> dict[int, HeadOrder]:
    """Insert an order of heads around the exchanges of ``sites``, in place. Returns the orders by index of the site."""
    groups = {group.name: group for group in rank_groups(gm)}
    found = {}
    for site in sites:
        order = _balanced(gm.graph, site, groups)
        if order is not None:
            found[site.index] = order
    return found


def _balanced(graph: fx.Graph, site: Site, groups: dict[str, RankGroup]) -> HeadOrder | None:
    call = site.call
    mask_shape = shape_of(call.attn_mask)
    if mask_shape is not None and len(mask_shape) > 3 and mask_shape[-3] != 1:
        return None
    ways_in = [_way_in(node) for node in (call.query, call.key, call.value)]
    way_out = _way_out(call.node)
    if way_out is None or any(way is None for way in ways_in):
        return None
    exchanges = [way.exchange for way in (*ways_in, way_out) if way is not None]
    names = {str(node.args[-1]) for node in exchanges}
    group = groups.get(next(iter(names))) if len(names) == 1 else None
    heads = {way.heads for way in (*ways_in, way_out) if way is not None}
    if group is None or heads != {group.size * site.num_heads}:
        return None
    return _emit(graph, site, [way for way in ways_in if way is not None], way_out, group)


@dataclass(frozen=True)
class _Way:
    """Through an exchange. node: before it, what reads all heads on axis ``dim``; after it, what yields them there."""

    node: fx.Node
    dim: int
    heads: int
    exchange: fx.Node


def _way_in(node: Any) -> _Way | None:
    """From the query, key or value of an attention back to where all heads are: [B, N, H, D] -> [B, N, W, H / W, D]."""
    exchange = _followed(node, lambda n: operator_name(n) == "all_to_all_single", _source)
    if exchange is None:
        return None
    move = _followed(_source(exchange), lambda n: operator_name(n) in _MOVES, _source, moves=False)
    split = None if move is None else _source(move)
    if move is None or split is None or operator_name(split) not in _PLAIN:
        return None
    before, after = shape_of(_source(split)), shape_of(split)
    if before is None or after is None or len(before) != 4 or len(after) != 5 or _moved(move, len(after))[0] != 2:
        return None
    if not all(isinstance(size, int) for size in (before[2], *after[2:4])) or before[2] != after[2] * after[3]:
        return None
    return _Way(split, 2, before[2], exchange)


def _way_out(node: fx.Node) -> _Way | None:
    """From the output of an attention to where all heads are again: [W, H / W, ...] -> [H, ...]."""
    exchange = _followed(node, lambda n: operator_name(n) == "all_to_all_single", _user)
    if exchange is None:
        return None
    move = _followed(_source(exchange), lambda n: operator_name(n) in _MOVES, _source, moves=False)
    sent = shape_of(move)
    if move is None or sent is None or len(sent) != 5 or _moved(move, 5)[:2] != [1, 3]:
        return None
    if not isinstance(sent[0], int) or not isinstance(sent[1], int):
        return None
    heads = sent[0] * sent[1]

    def has_all_heads(found: fx.Node) -> bool:
        shape = shape_of(found)
        return shape is not None and len(shape) == 4 and shape[0] == heads

    joined = _followed(_user(exchange), has_all_heads, _user, moves=False)
    return None if joined is None else _Way(joined, 0, heads, exchange)


def _followed(node: Any, wanted: Callable[[fx.Node], bool], step: Callable[[Any], Any], moves: bool = True) -> Any:
    """The first node that is ``wanted``, over nodes that only look at the same elements in another way."""
    passable = _PLAIN | _MOVES if moves else _PLAIN
    while isinstance(node, fx.Node) and not wanted(node):
        if operator_name(node) not in passable and not _is_attention(node):
            return None
        node = step(node)
    return node if isinstance(node, fx.Node) else None


def _is_attention(node: fx.Node) -> bool:
    return "attention" in operator_name(node) or operator_name(node) == "getitem"


def _source(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.args else None


def _user(node: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _moved(node: fx.Node, rank: int) -> list[int]:
    """Where the axes of a permutation or transposition come from."""
    given: list[Any] = list(node.args[1:])
    if operator_name(node) == "permute":
        axes = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        return [int(axis) % rank for axis in axes]
    order = list(range(rank))
    first, second = (int(axis) % rank for axis in given)
    order[first], order[second] = second, first
    return order


def _emit(graph: fx.Graph, site: Site, ways_in: list[_Way], way_out: _Way, group: RankGroup) -> HeadOrder:
    prefix = f"svg2_{site.index}_"
    place = {node: index for index, node in enumerate(graph.nodes)}
    build = GraphBuilder(graph, min((way.node for way in ways_in), key=place.__getitem__), prefix)
    device = build.value(way_out.node).device
    order = build.call(_aten.arange.default, way_out.heads, device=device, name="head_order")
    back = build.call(_aten.argsort.default, order, name="head_places")
    for way in ways_in:
        build = GraphBuilder(graph, way.node, prefix)
        source = _source(way.node)
        way.node.replace_input_with(source, build.call(_aten.index_select.default, source, way.dim, order))
    users = list(way_out.node.users)
    build = GraphBuilder(graph, way_out.node.next, prefix)
    restored = build.call(_aten.index_select.default, way_out.node, way_out.dim, back)
    for user in users:
        user.replace_input_with(way_out.node, restored)
    return HeadOrder(order, way_out.heads, group.size, group.name)
