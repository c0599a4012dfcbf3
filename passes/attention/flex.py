"""Read FlexAttention: a higher-order operator with a function of scores and a function that masks.

flex_attention(query, key, value, score_mod, (..., mask_mod), scale, ...)

score_mod returns its first argument               ->  plain attention; any other changes scores: "unreadable"
mask_mod returns True                              ->  no mask
mask_mod depends on batch and key alone            ->  key padding
mask_mod depends on the query or on the head       ->  "query_dependent_mask"
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from svg2_compile.passes.attention.call import AttentionCall, KeyMask, UnreadableAttention
from svg2_compile.passes.graph.nodes import module_path, operator_name

__all__ = ["read_flex_attention"]

_BATCH, _HEAD, _QUERY, _KEY = range(4)
_ONES = frozenset({"new_ones", "ones", "ones_like", "full", "new_full", "full_like"})


@dataclass(frozen=True)
class _Call:
    query: Any
    key: Any
    value: Any
    score_mod: Any
    block_mask: Any
    scale: Any
    kernel_options: Any
    score_operands: tuple[Any, ...] = ()
    mask_operands: tuple[Any, ...] = ()


def read_flex_attention(gm: fx.GraphModule, node: fx.Node) -> AttentionCall | UnreadableAttention | None:
    """The attention of a flex_attention node; None if it is none."""
    if not isinstance(node.target, HigherOrderOperator) or node.target.name() != "flex_attention":
        return None
    name = module_path(node)
    if not 7 <= len(node.args) <= 9:
        return UnreadableAttention(node, name, "unreadable", "flex_attention of another version of PyTorch")
    arguments: tuple[Any, ...] = node.args
    call = _Call(*arguments)
    if not _returns_first(_body(gm, call.score_mod)):
        return UnreadableAttention(node, name, "unreadable", "flex_attention with a score_mod: leave it out")
    reads = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(reads) != len(node.users) or any(index != 0 and user.users for index, user in reads.items()):
        return UnreadableAttention(node, name, "aux_outputs", "the log-sum-exp of flex_attention is used")
    if 0 not in reads:
        return None
    body = _body(gm, call.block_mask[-1])
    if body is None or _depends_on(body, (_HEAD, _QUERY)):
        detail = "flex_attention with a mask that differs from query to query: only key padding is sparse"
        return UnreadableAttention(node, name, "query_dependent_mask", detail)
    mask = None if _is_true(body) else KeyMask(body, tuple(call.mask_operands))
    scale = call.scale if isinstance(call.scale, (int, float)) else None
    return AttentionCall(
        *(reads[0], call.query, call.key, call.value),
        scale=None if scale is None else float(scale),
        form="flex_attention",
        name=name,
        key_mask=mask,
        source=node,
    )


def _body(gm: fx.GraphModule, node: Any) -> fx.GraphModule | None:
    body = gm.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return body if isinstance(body, fx.GraphModule) else None


def _returns_first(body: fx.GraphModule | None) -> bool:
    return body is not None and _result(body) is body.graph.find_nodes(op="placeholder")[0]


def _result(body: fx.GraphModule) -> Any:
    result = body.graph.output_node().args[0]
    return result[0] if isinstance(result, (tuple, list)) else result


def _is_true(body: fx.GraphModule) -> bool:
    result = _result(body)
    if result is True:
        return True
    filled = isinstance(result, fx.Node) and operator_name(result) in _ONES
    return filled and ("full" not in operator_name(result) or result.args[-1] is True)


def _depends_on(body: fx.GraphModule, places: tuple[int, ...]) -> bool:
    """Whether the values of a mask (not only its device) depend on some of its arguments."""
    placeholders = body.graph.find_nodes(op="placeholder")
    result = _result(body)
    waiting, seen = [result] if isinstance(result, fx.Node) else [], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen and operator_name(node) not in _ONES:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return any(placeholders[place] in seen for place in places)
