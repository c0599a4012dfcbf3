"""Read masks that only depend on (batch, key): padding of text or video tokens.

Three spellings are exact and read:

    bool       True = attend: [B, 1 or H, 1, N], also where size-1 axes were expanded or repeated to more queries
    bool & bool   of such a mask with one over queries alone, [B, 1 or H, N, 1]: padding attends to nothing either
    additive   provably zero or so negative that a key gets no weight: (1 - bool) * -10000, masked_fill(0, bool, -inf),
               where(bool, 0, -inf), through casts, views, expansions and repetitions

Everything else keeps the attention dense: a mask that differs from query to query, or a bias of any value. A sequence
without any valid key attends to nothing and yields zero, as does a query that may not attend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.decomposed import MOST_EXCLUDING_BIAS
from svg2_compile.passes.attention.find import AttentionCall
from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.graph.nodes import bind_arguments, operator_name, shape_of
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.axes import same_length, size_expr

__all__ = ["KeyPadding", "MaskSkip", "QueryPadding", "emit_valid", "emit_zero_padding", "read_key_padding"]

_COPY = {"to", "_to_copy", "float", "half", "bfloat16", "type_as", "type", "clone", "contiguous", "detach", "alias"}
_MOVE = {"view", "reshape", "_unsafe_view", "expand", "repeat", "repeat_interleave", "unsqueeze", "squeeze", "flatten"}
_MOVE |= {"unflatten", "transpose", "permute", "__getitem__", "getitem", "select", "slice", "lift_fresh_copy"}
_AND = {"and_", "__and__", "__iand__", "bitwise_and", "logical_and"}
_TRANSPOSE = {"transpose", "swapaxes", "swapdims"}


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
    if call.attn_mask is None:
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
    lowest = _excluding_value(mask)
    if lowest is None:
        return MaskSkip("additive_bias", "the mask adds a bias that may have any value: only key padding is sparse")
    return KeyPadding(mask, "bias", max(lowest, 2 * MOST_EXCLUDING_BIAS) / 2)


def _outer_product(call: AttentionCall) -> KeyPadding | None:
    """A bool mask over keys and one over queries, combined by "and"; None if the mask is anything else.

    Only where the operator itself yields zero for a query without keys: a spelled-out softmax yields the mean of all.
    """
    mask = None if call.attn_mask is None else _before_bool_copies(call.attn_mask)
    if mask is None or call.form != "sdpa" or call.mask_excludes or operator_name(mask) not in _AND:
        return None
    sides = [side for side in mask.args if isinstance(side, fx.Node) and _is_bool(side)]
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
    if operator_name(mask) not in _TRANSPOSE or len(mask.args) != 3 or not isinstance(mask.args[0], fx.Node):
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
    while operator_name(mask) in _COPY | {"bool"} and mask.args and isinstance(mask.args[0], fx.Node):
        if not (_is_bool(mask) and _is_bool(mask.args[0])):
            return mask
        mask = mask.args[0]
    return mask


def _same(size: Any, other: Any) -> bool:
    return same_length(size_expr(size), size_expr(other))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _excluding_value(node: fx.Node) -> float | None:
    """The one negative value of an additive mask whose only other value is 0; None where that cannot be shown."""
    for _ in range(16):
        name = operator_name(node)
        if name in _COPY | _MOVE and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        if name in ("mul", "mul_", "__mul__"):
            return _of_product(node)
        if name in ("masked_fill", "masked_fill_"):
            return _of_fill(node)
        if name == "where":
            return _of_where(node)
        return None
    return None


def _of_product(node: fx.Node) -> float | None:
    """(1 - bool) * negative."""
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(numbers) != 1 or len(tensors) != 1 or numbers[0] > MOST_EXCLUDING_BIAS:
        return None
    inverted = _through_copies(tensors[0])
    if operator_name(inverted) not in ("sub", "rsub", "__rsub__"):
        return float(numbers[0]) if _is_bool(inverted) else None
    operands = inverted.args[::-1] if operator_name(inverted) in ("rsub", "__rsub__") else inverted.args
    if operands[0] not in (1, 1.0) or not isinstance(operands[1], fx.Node):
        return None
    return float(numbers[0]) if _is_bool(_through_copies(operands[1])) else None


def _of_fill(node: fx.Node) -> float | None:
    arguments = bind_arguments(node, ("self", "mask", "value"))
    base, fill = arguments.get("self", arguments.get("input")), arguments.get("value")
    if not isinstance(base, fx.Node) or not _is_number(base, 0.0) or not isinstance(fill, (int, float)):
        return None
    return float(fill) if fill <= MOST_EXCLUDING_BIAS else None


def _of_where(node: fx.Node) -> float | None:
    if len(node.args) != 3:
        return None
    values = [_number_of(arg) for arg in node.args[1:]]
    if None in values or 0.0 not in values:
        return None
    other = min(value for value in values if value is not None)
    return other if other <= MOST_EXCLUDING_BIAS else None


def _through_copies(node: fx.Node) -> fx.Node:
    """Skip casts and moves, except a cast from bool: there the values become 0 and 1."""
    while (
        operator_name(node) in _COPY | _MOVE and node.args and isinstance(node.args[0], fx.Node) and not _is_bool(node)
    ):
        node = node.args[0]
    return node


def _is_bool(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_number(node: fx.Node, number: float) -> bool:
    return _number_of(node) == number


def _number_of(argument: Any) -> float | None:
    """The number that an argument is or is filled with everywhere; None if it is no constant."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if not isinstance(argument, fx.Node):
        return None
    name = operator_name(argument)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("scalar_tensor", "tensor") and isinstance(argument.args[0], (int, float)):
        return float(argument.args[0])
    if name in ("full", "full_like", "new_full") and isinstance(argument.args[1], (int, float)):
        return float(argument.args[1])
    if name in _COPY | _MOVE and argument.args:
        return _number_of(argument.args[0])
    return None


def emit_valid(build: GraphBuilder, padding: KeyPadding, batch: Any, num_tokens: Any) -> fx.Node:
    """Insert nodes that yield bool [batch, 1 or H, num_tokens], True where a key is attended."""
    mask = padding.mask
    if padding.means == "exclude":
        mask = build.call(torch.ops.aten.logical_not.default, mask)
    elif padding.means == "bias":
        threshold = padding.threshold if math.isfinite(padding.threshold) else MOST_EXCLUDING_BIAS
        mask = build.call(torch.ops.aten.gt.Scalar, mask, threshold)
    rank = len(build.value(mask).shape)
    if rank >= 2:
        mask = build.call(torch.ops.aten.squeeze.dim, mask, -2)
    for _ in range(rank - 1, 3) if rank >= 2 else range(rank, 3):
        mask = build.call(torch.ops.aten.unsqueeze.default, mask, 0)
    return build.call(torch.ops.aten.expand.default, mask, [batch, -1, num_tokens], name="valid")


def emit_zero_padding(build: GraphBuilder, queries: QueryPadding, out: fx.Node) -> fx.Node:
    """Insert nodes that yield ``out`` [B, H, Nq, Dv] with zeros for the queries that do not attend."""
    padding = build.call(torch.ops.aten.logical_not.default, queries.mask)
    if queries.transposed:
        padding = build.call(torch.ops.aten.transpose.int, padding, -2, -1)
    return build.call(torch.ops.aten.masked_fill.Scalar, out, padding, 0.0, name="of_attending_queries")
