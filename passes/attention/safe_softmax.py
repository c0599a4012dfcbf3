"""Recognise the softmax that PyTorch guards against rows without a key, as run_decompositions() spells it out:

    weights = where(not any(not (scores == -inf)), zeros, softmax(scores))

Such a row becomes zero instead of NaN: what the rewritten attention yields, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from svg2_compile.passes.graph.nodes import operator_name

__all__ = ["Weights", "guarded_weights"]


@dataclass(frozen=True)
class Weights:
    """The weights of an attention. node: as the rest of the graph sees them. guards: what else may use the softmax and
    the scores."""

    node: fx.Node
    guards: frozenset[fx.Node]


def guarded_weights(softmax: fx.Node) -> Weights:
    """The weights that a softmax yields: behind its guard, if it has one."""
    for user in softmax.users:
        if operator_name(user) != "where" or len(user.args) != 3 or user.args[2] is not softmax:
            continue
        condition, zeros = user.args[0], user.args[1]
        chain = _unary_chain(condition, ("logical_not", "any", "logical_not", "eq"))
        if chain is None or not isinstance(zeros, fx.Node) or not _is_zero(zeros):
            continue
        compared = chain[-1]
        if compared.args[0] is softmax.args[0] and compared.args[1] == -math.inf:
            return Weights(user, frozenset({zeros, compared}))
    return Weights(softmax, frozenset())


def _unary_chain(node: Any, names: tuple[str, ...]) -> list[fx.Node] | None:
    """The nodes called ``names``, each the only user of the next, from ``node`` upwards; None if they differ."""
    chain: list[fx.Node] = []
    for name in names:
        if not isinstance(node, fx.Node) or operator_name(node) != name or len(node.users) != 1:
            return None
        chain.append(node)
        node = node.args[0]
    return chain


def _is_zero(node: fx.Node) -> bool:
    name = operator_name(node)
    return name in ("zeros_like", "zeros") or (name in ("full_like", "full") and bool(node.args[1] == 0))
