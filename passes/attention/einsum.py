"""Read the two products of an attention that are spelled with einsum:

    scores = einsum("b i h d, b j h d -> b h i j", query, key)         weights = softmax(scores)
    out = einsum("b h i j, b j h d -> b i h d", weights, value)

Which letter is what follows from the scores: their last two axes are queries and keys; what query and key share besides
is batch and heads; what the scores have not is head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from svg2_compile.passes.graph.nodes import operator_name

__all__ = ["EinsumLayout", "einsum_layout", "einsum_operands"]

_AXES = {("b", "h", "n", "d"): "bhnd", ("b", "n", "h", "d"): "bnhd", ("b", "n", "d"): "gnd"}


@dataclass(frozen=True)
class EinsumLayout:
    """axes: of query, key and value; out_axes: of the output."""

    axes: str
    out_axes: str


def einsum_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of an einsum; None for any other node."""
    if operator_name(node) != "einsum":
        return None
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    assert isinstance(given, (list, tuple))
    operands = [operand for operand in given if isinstance(operand, fx.Node)]
    return (operands[0], operands[1]) if len(operands) == len(given) == 2 else None


def einsum_layout(scores: fx.Node, product: fx.Node) -> EinsumLayout | None:
    """How the tensors of an attention lie; None where the two equations are none of an attention."""
    first, second = _letters(scores), _letters(product)
    if first is None or second is None:
        return None
    (query, key, out), (weights, value, attended) = first, second
    if len(out) not in (3, 4) or len(weights) != len(out):
        return None
    roles = dict(zip(out, "bhqk" if len(out) == 4 else "bqk", strict=True))
    hidden = (set(query) | set(key)) - set(out)
    if len(hidden) != 1:
        return None
    roles[hidden.pop()] = "d"
    # The second equation may use other letters for the same axes.
    renamed = dict(zip(weights, out, strict=True))
    width = (set(value) | set(attended)) - set(weights)
    if len(width) != 1:
        return None
    others = {**{letter: roles[name] for letter, name in renamed.items()}, width.pop(): "d"}
    layouts = [
        _axes(query, roles, "q"),
        _axes(key, roles, "k"),
        _axes(value, others, "k"),
        _axes(attended, others, "q"),
    ]
    if None in layouts or len(set(layouts[:3])) != 1:
        return None
    return EinsumLayout(str(layouts[0]), str(layouts[3]))


def _letters(node: fx.Node) -> tuple[str, str, str] | None:
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not comma or "," in right or any(len(set(term)) != len(term) for term in (left, right, output)):
        return None
    return left, right, output


def _axes(letters: str, roles: dict[str, str], tokens: str) -> str | None:
    names = tuple("n" if roles.get(letter) == tokens else roles.get(letter, "?") for letter in letters)
    return _AXES.get(names)
