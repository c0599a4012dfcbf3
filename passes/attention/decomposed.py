"""Read an attention that is spelled out: softmax(query @ key^T * scale + mask) @ value.

A guarded walk from the softmax, upwards to the first matrix product and downwards to the second; whatever lies on the
way and is not understood makes the attention unreadable. Batched layouts are read:

    matmul on [B, H, N, D]                                                     -> axes "bhnd"
    bmm on [B * H, N, D], with views to [B, H, N, N] around the softmax or not -> axes "gnd"
    einsum on any order of these axes, see einsum.py                           -> "bhnd", "bnhd" or "gnd"

A softmax that has no matrix product on both sides is no attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.additive import MOST_EXCLUDING_BIAS
from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.attention.einsum import einsum_layout, einsum_operands
from svg2_compile.passes.attention.safe_softmax import guarded_weights
from svg2_compile.passes.attention.spellings import (
    ADD,
    COPIES,
    DIVIDE,
    DROPOUT,
    MASKED_FILL,
    MATMUL,
    MULTIPLY,
    RESHAPES,
    SOFTMAX,
)
from svg2_compile.passes.graph.nodes import bind_arguments, module_path, operator_name, shape_of, users_of
from svg2_compile.passes.graph.values import node_value

__all__ = ["read_decomposed"]

# Between scores and their product; narrower than what _step_up reads, since here nothing is checked.
_ON_THE_WAY = COPIES | RESHAPES | {"mul", "mul_", "div", "div_", "truediv", "add"}
_WAY_OUT = "use torch.nn.functional.scaled_dot_product_attention in the model"


@dataclass
class _Scores:
    """What stands between query @ key^T and the softmax."""

    product: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    mask_excludes: bool = False
    heads: int | None = None


class _NotUnderstood(Exception):
    """Something on the way has no reading; the message names it."""


def read_decomposed(node: fx.Node) -> AttentionCall | UnreadableAttention | None:
    """The attention whose softmax ``node`` is; None if it is no softmax or no attention's."""
    if node.op not in ("call_function", "call_method") or operator_name(node) not in SOFTMAX:
        return None
    weights = guarded_weights(node)
    product = _product_below(weights.node)
    if product is None or not _has_product_above(node):
        return None
    try:
        if not _over_last_axis(node):
            raise _NotUnderstood("the softmax is not over the last axis")
        scores = _read_scores(node, weights.guards)
        if (
            any(user is not weights.node and user not in weights.guards for user in users_of(node))
            and weights.node is not node
        ):
            raise _NotUnderstood("the attention weights are used elsewhere")
        consumer = _sole_consumer(weights.node, product)
        if "einsum" in (operator_name(scores.product), operator_name(product)):
            return _einsum_call(node, product, scores, consumer)
        names = ("input", "batch1", "batch2") if operator_name(scores.product) == "baddbmm" else ("batch1", "batch2")
        operands = dict(zip(names, scores.product.args, strict=False))
        call = _make_call(node, product, scores, operands.get("batch1"), operands.get("batch2"), consumer)
    except _NotUnderstood as error:
        return UnreadableAttention(node, module_path(node), "unreadable", f"{error}: {_WAY_OUT}")
    return call


def _make_call(
    softmax: fx.Node, product: fx.Node, scores: _Scores, query: Any, key_transposed: Any, weights: fx.Node
) -> AttentionCall:
    value = product.args[1]
    shape = shape_of(query)
    if not all(isinstance(operand, fx.Node) for operand in (query, key_transposed, value)) or shape is None:
        raise _NotUnderstood("an operand of the matrix products is no tensor of the graph")
    assert isinstance(query, fx.Node) and isinstance(key_transposed, fx.Node) and isinstance(value, fx.Node)
    if len(shape) not in (3, 4):
        raise _NotUnderstood(f"matrix products of rank {len(shape)}")
    if shape_of(value) is None or len(shape_of(value) or ()) != len(shape) or product.args[0] is not weights:
        raise _NotUnderstood("the attention weights are not the left operand of a matrix product of the same rank")
    return AttentionCall(
        node=product,
        query=query,
        key=key_transposed,
        value=value,
        attn_mask=scores.mask,
        mask_excludes=scores.mask_excludes,
        scale=scores.scale,
        axes="bhnd" if len(shape) == 4 else "gnd",
        key_transposed=True,
        num_heads=scores.heads if len(shape) == 3 else None,
        form="decomposed",
        name=module_path(softmax),
    )


def _einsum_call(softmax: fx.Node, product: fx.Node, scores: _Scores, weights: fx.Node) -> AttentionCall:
    first, second = einsum_operands(scores.product), einsum_operands(product)
    layout = einsum_layout(scores.product, product) if first is not None and second is not None else None
    if first is None or second is None or layout is None or second[0] is not weights:
        raise _NotUnderstood("an einsum that is not query @ key^T or weights @ value")
    return AttentionCall(
        *(product, first[0], first[1], second[1]),
        attn_mask=scores.mask,
        mask_excludes=scores.mask_excludes,
        scale=scores.scale,
        axes=layout.axes,
        out_axes=None if layout.out_axes == layout.axes else layout.out_axes,
        num_heads=scores.heads if layout.axes == "gnd" else None,
        form="decomposed",
        name=module_path(softmax),
    )


def _read_scores(softmax: fx.Node, guards: frozenset[fx.Node]) -> _Scores:
    """Walk up from the softmax to query @ key^T, collecting scale and mask."""
    scores = _Scores(softmax)
    current = softmax.args[0]
    while True:
        if not isinstance(current, fx.Node):
            raise _NotUnderstood("the softmax has no tensor of the graph as input")
        name = operator_name(current)
        if len(users_of(current) - guards) != 1:
            raise _NotUnderstood(f"the scores ({name}) are used elsewhere")
        if name in MATMUL | {"einsum"}:
            scores.product = current
            return scores
        if name == "baddbmm":
            _read_baddbmm(current, scores)
            return scores
        current = _step_up(current, name, scores)


def _step_up(node: fx.Node, name: str, scores: _Scores) -> Any:
    if name in COPIES:
        return node.args[0]
    if name in RESHAPES:
        _read_reshape(node, scores)
        return node.args[0]
    if name in MULTIPLY | DIVIDE:
        return _read_scale(node, name, scores)
    if name in ADD:
        return _read_mask(node, scores)
    if name in MASKED_FILL or name == "where":
        return _read_bool_mask(node, name, scores)
    raise _NotUnderstood(f"{name or node.target} between the product and the softmax")


def _read_reshape(node: fx.Node, scores: _Scores) -> None:
    """[B * H, N, N] -> [B, H, N, N] tells the number of heads; another rank change is not read."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None:
        raise _NotUnderstood("a view of unknown shape")
    if tuple(before[-2:]) != tuple(after[-2:]):
        raise _NotUnderstood("a view that mixes tokens with other axes")
    if len(before) == 3 and len(after) == 4:
        if not isinstance(after[1], int):
            raise _NotUnderstood("a symbolic number of heads")
        scores.heads = after[1]


def _read_scale(node: fx.Node, name: str, scores: _Scores) -> Any:
    left, right = node.args[0], node.args[1]
    if isinstance(left, (int, float)):
        left, right = right, left
        if "div" in name:
            raise _NotUnderstood("a number divided by the scores")
    if not isinstance(right, (int, float)):
        raise _NotUnderstood("scores scaled by something that is not a number")
    scores.scale *= 1.0 / right if "div" in name else float(right)
    return left


def _read_mask(node: fx.Node, scores: _Scores) -> Any:
    """scores + mask. The scores are the operand that leads to a matrix product."""
    if scores.mask is not None:
        raise _NotUnderstood("two masks added to the scores")
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    if len(operands) != 2 or node.kwargs.get("alpha", 1) != 1:
        raise _NotUnderstood("an addition to the scores that is no mask")
    leading = [operand for operand in operands if _leads_to_product(operand)]
    if len(leading) != 1:
        raise _NotUnderstood("an addition to the scores of which neither or both sides are scores")
    scores.mask = operands[1] if leading[0] is operands[0] else operands[0]
    return leading[0]


def _read_bool_mask(node: fx.Node, name: str, scores: _Scores) -> Any:
    """scores.masked_fill(mask, -inf), or where(mask, scores, -inf)."""
    if scores.mask is not None:
        raise _NotUnderstood("two masks on the scores")
    first, second, fill = node.args[:3]
    source, mask = (second, first) if name == "where" else (first, second)
    if not isinstance(fill, (int, float)) or fill > MOST_EXCLUDING_BIAS or not isinstance(mask, fx.Node):
        raise _NotUnderstood(f"{name} on the scores that does not exclude keys")
    scores.mask = mask
    scores.mask_excludes = name != "where"
    return source


def _read_baddbmm(node: fx.Node, scores: _Scores) -> None:
    """baddbmm(bias, query, key^T, beta, alpha): diffusers' old attention passes an uninitialised bias with beta 0."""
    arguments = bind_arguments(node, ("input", "batch1", "batch2"))
    if arguments.get("beta", 1) != 0:
        raise _NotUnderstood("baddbmm that adds its first operand")
    scores.scale *= float(arguments.get("alpha", 1))
    scores.product = node


def _leads_to_product(node: fx.Node, depth: int = 6) -> bool:
    """Whether only casts, views and scaling lie between ``node`` and a matrix product above it."""
    for _ in range(depth):
        name = operator_name(node)
        if name in MATMUL or name in ("baddbmm", "einsum"):
            return True
        if name not in _ON_THE_WAY:
            return False
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if not tensors:
            return False
        node = tensors[0]
    return False


def _has_product_above(softmax: fx.Node) -> bool:
    source = softmax.args[0] if softmax.args else None
    return isinstance(source, fx.Node) and any(
        _leads_to_product(operand) for operand in (source, *(a for a in source.args if isinstance(a, fx.Node)))
    )


def _product_below(softmax: fx.Node) -> fx.Node | None:
    """The matrix product that the weights reach through casts, views and inactive dropout; None if there is none."""
    current = softmax
    for _ in range(8):
        for user in users_of(current):
            operands = einsum_operands(user)
            if operator_name(user) in MATMUL or (operands is not None and operands[0] is current):
                return user
        followed = [user for user in users_of(current) if operator_name(user) in COPIES | RESHAPES | DROPOUT]
        if not followed:
            return None
        current = followed[0]
    return None


def _sole_consumer(softmax: fx.Node, product: fx.Node) -> fx.Node:
    """The node through which the weights enter ``product``, if nothing else uses them."""
    current = softmax
    while True:
        users = users_of(current)
        if len(users) != 1:
            raise _NotUnderstood("the attention weights are used elsewhere")
        (user,) = users
        if user is product:
            return current
        if operator_name(user) in DROPOUT and _drops(user):
            raise _NotUnderstood("dropout on the attention weights")
        current = user


def _drops(node: fx.Node) -> bool:
    arguments = bind_arguments(node, ("input", "p", "training"))
    return bool(arguments.get("p", 0.5)) and bool(arguments.get("training", arguments.get("train", True)))


def _over_last_axis(softmax: fx.Node) -> bool:
    arguments = bind_arguments(softmax, ("input", "dim"))
    dim = arguments.get("dim")
    value = node_value(softmax)
    return isinstance(value, torch.Tensor) and dim in (-1, value.dim() - 1)
