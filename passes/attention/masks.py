"""Read masks that only depend on (batch, key): padding of text or video tokens.

Three spellings are exact and read:

    bool       True = attend: [B, 1 or H, 1, N], also where size-1 axes were expanded or repeated to more queries
    bool & bool   of such a mask with one over queries alone, [B, 1 or H, N, 1]: padding attends to nothing either
    additive   provably zero or so negative that a key gets no weight (see additive.py)

Everything else keeps the attention dense: a mask that differs from query to query, or a bias of any value. A sequence
without any valid key attends to nothing and yields zero, as does a query that may not attend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.additive import MOST_EXCLUDING_BIAS, excluding_value, is_zero
from svg2_compile.passes.attention.call import AttentionCall
from svg2_compile.passes.attention.spellings import AND, COPIES, TRANSPOSE
from svg2_compile.passes.graph.nodes import is_bool, operator_name, shape_of
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.lengths import same_length, size_expr

__all__ = ["KeyPadding", "MaskSkip", "QueryPadding", "read_key_padding"]


@dataclass(frozen=True)
class QueryPadding:
    """A mask over queries, bool, True = attends. mask: broadcastable to [B, H, Nq, Nk], the key axis being 1 or, where
    ``transposed``, the query axis being 1 and its last two axes to be swapped."""

    mask: fx.Node
    transposed: bool


@dataclass(frozen=True)
class KeyPadding:
    """A mask over keys. mask: broadcastable to [B, H, Nq, Nk], the query axis being 1. means: "attend" (bool, True =
    attended), "exclude" (bool, True = not attended) or "bias" (0 = attended, below threshold = not). queries: those
    that attend at all; None if all do."""

    mask: fx.Node
    means: str
    threshold: float = 0.0
    queries: QueryPadding | None = None


@dataclass(frozen=True)
class MaskSkip:
    """Why a mask keeps an attention dense: reason is a stable code."""

    reason: str
    detail: str


def read_key_padding(call: AttentionCall) -> KeyPadding | MaskSkip | None:
    """The key padding of a call; None if it has no mask; a MaskSkip if its mask is anything else."""
    if call.attn_mask is None or (not is_bool(call.attn_mask) and is_zero(call.attn_mask)):
        return None
    mask = _before_query_expansion(call.attn_mask)
    shape = shape_of(mask)
    if mask is None or shape is None:
        return _outer_product(call) or MaskSkip(
            "query_dependent_mask", "the mask has a row for every query: only key padding is sparse"
        )
    value = node_value(mask)
    if value.dtype == torch.bool:
        return KeyPadding(mask, "exclude" if call.mask_excludes else "attend")
    lowest = excluding_value(mask)
    if lowest is None:
        return MaskSkip("additive_bias", "the mask adds a bias that may have any value: only key padding is sparse")
    return KeyPadding(mask, "bias", max(lowest, 2 * MOST_EXCLUDING_BIAS) / 2)


def _outer_product(call: AttentionCall) -> KeyPadding | None:
    """A bool mask over keys and one over queries, combined by "and"; None if the mask is anything else.

    Only where the operator itself yields zero for a query without keys: a spelled-out softmax yields the mean of all.
    """
    mask = None if call.attn_mask is None else _before_bool_copies(call.attn_mask)
    if mask is None or call.form != "sdpa" or call.mask_excludes or operator_name(mask) not in AND:
        return None
    sides = [side for side in mask.args if isinstance(side, fx.Node) and is_bool(side)]
    if len(sides) != 2:
        return None
    for first, second in (sides, sides[::-1]):
        keys, queries = _before_expansion(first, axis=-2), _query_padding(second)
        if keys is not None and queries is not None:
            return KeyPadding(keys, "attend", queries=queries)
    return None


def _query_padding(mask: fx.Node) -> QueryPadding | None:
    """A mask that is the same for every key, followed through expand, repeat and the transposition of a key mask."""
    mask = _before_bool_copies(mask)
    plain = _before_expansion(mask, axis=-1)
    if plain is not None:
        return QueryPadding(plain, transposed=False)
    if operator_name(mask) not in TRANSPOSE or len(mask.args) != 3 or not isinstance(mask.args[0], fx.Node):
        return None
    keys, rank = _before_expansion(mask.args[0], axis=-2), len(shape_of(mask) or ())
    if keys is None or {axis % rank for axis in mask.args[1:] if isinstance(axis, int)} != {rank - 2, rank - 1}:
        return None
    return QueryPadding(keys, transposed=True)


def _before_query_expansion(mask: fx.Node) -> fx.Node | None:
    """The mask with a query axis of size 1, or None: followed through expand and repeat."""
    shape = shape_of(mask)
    return mask if shape is not None and len(shape) < 2 else _before_expansion(mask, axis=-2)


def _before_expansion(mask: fx.Node, axis: int) -> fx.Node | None:
    """The mask with an axis (-1 or -2) of size 1, or None: followed through expand and repeat of nothing else."""
    for _ in range(4):
        shape = shape_of(mask)
        if shape is None or len(shape) < 2:
            return None
        if _is_one(shape[axis]):
            return mask
        mask = _before_bool_copies(mask)
        source = mask.args[0] if operator_name(mask) in ("expand", "repeat") else None
        inner = shape_of(source)
        if not isinstance(source, fx.Node) or inner is None or len(inner) < 2:
            return None
        if not _same(inner[-3 - axis], shape[-3 - axis]):
            return None
        if not all(
            _is_one(size) or _same(size, outer) for size, outer in zip(inner[-3::-1], shape[-3::-1], strict=False)
        ):
            return None  # a batch that was repeated is no batch of one
        mask = source
    return None


def _before_bool_copies(mask: fx.Node) -> fx.Node:
    """A bool mask before it was copied or cast to bool again."""
    while operator_name(mask) in COPIES | {"bool"} and mask.args and isinstance(mask.args[0], fx.Node):
        if not (is_bool(mask) and is_bool(mask.args[0])):
            return mask
        mask = mask.args[0]
    return mask


def _same(size: Any, other: Any) -> bool:
    return same_length(size_expr(size), size_expr(other))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
