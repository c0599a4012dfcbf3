"""Whether an additive mask only excludes keys: its values are 0 and one so negative that a key gets no weight.

    (1 - bool) * -10000        masked_fill(zeros, bool, -inf)        where(bool, 0, -inf)

through casts, views, expansions and repetitions. Any other bias has no reading: the attention then stays dense.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from svg2_compile.passes.attention.spellings import COPIES, MASKED_FILL, MOVES, MULTIPLY
from svg2_compile.passes.graph.nodes import bind_arguments, is_bool, is_written, operator_name

__all__ = ["MOST_EXCLUDING_BIAS", "excluding_value", "is_zero"]

# A bias at most this large leaves a key no weight: exp(-1000) is zero in every dtype.
MOST_EXCLUDING_BIAS = -1000.0


def excluding_value(node: fx.Node) -> float | None:
    """The one negative value of an additive mask whose only other value is 0; None where that cannot be shown."""
    for _ in range(16):
        name = operator_name(node)
        if name in COPIES | MOVES and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        if name in MULTIPLY:
            return _of_product(node)
        if name in MASKED_FILL:
            return _of_fill(node)
        if name == "where":
            return _of_where(node)
        return None
    return None


def is_zero(node: fx.Node) -> bool:
    """Whether a mask is zero everywhere: made so, and written by nobody since."""
    current: Any = node
    while isinstance(current, fx.Node):
        if is_written(current):
            return False
        if operator_name(current) not in COPIES | MOVES or not current.args:
            return _number_of(current) == 0.0
        current = current.args[0]
    return False


def _of_product(node: fx.Node) -> float | None:
    """(1 - bool) * negative, or bool * negative."""
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(numbers) != 1 or len(tensors) != 1 or numbers[0] > MOST_EXCLUDING_BIAS:
        return None
    inverted = _through_copies(tensors[0])
    if operator_name(inverted) not in ("sub", "rsub", "__rsub__"):
        return float(numbers[0]) if is_bool(inverted) else None
    operands = inverted.args[::-1] if operator_name(inverted) in ("rsub", "__rsub__") else inverted.args
    if operands[0] not in (1, 1.0) or not isinstance(operands[1], fx.Node):
        return None
    return float(numbers[0]) if is_bool(_through_copies(operands[1])) else None


def _of_fill(node: fx.Node) -> float | None:
    """zeros.masked_fill(bool, negative)."""
    arguments = bind_arguments(node, ("self", "mask", "value"))
    base, fill = arguments.get("self", arguments.get("input")), arguments.get("value")
    if not isinstance(base, fx.Node) or _number_of(base) != 0.0 or not isinstance(fill, (int, float)):
        return None
    return float(fill) if fill <= MOST_EXCLUDING_BIAS else None


def _of_where(node: fx.Node) -> float | None:
    """where(bool, 0, negative), or the other way round."""
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
        operator_name(node) in COPIES | MOVES and node.args and isinstance(node.args[0], fx.Node) and not is_bool(node)
    ):
        node = node.args[0]
    return node


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
    if name in COPIES | MOVES and argument.args:
        return _number_of(argument.args[0])
    return None
