"""Branches on comparisons whose outcome is known: `assert lengths.max() <= n`, `if lengths[0] == n`.

Dynamo breaks a graph at a branch on a tensor. Where the tensor compares numbers that were made of Python numbers, the
outcome is known, or depends on sizes, on which Dynamo puts a guard.
"""

from __future__ import annotations

import dis
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.graph.known_numbers import linear_difference
from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["Instruction", "jumps", "tables"]

log = get_logger()

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}


@dataclass(frozen=True)
class Instruction:
    """An instruction of Dynamo's, such as a conditional jump: where it is kept, as it is, and as it knows outcomes."""

    table: list[Any]
    place: int
    before: Callable[..., Any]
    knowing: Callable[..., Any]


@functools.cache
def jumps() -> tuple[Instruction, ...]:
    """All conditional jumps. Found once: every call of an enabled model replaces them."""
    places = [code for name, code in dis.opmap.items() if "JUMP" in name and "IF" in name]
    return tuple(Instruction(table, at, table[at], _knowing_outcome(table[at])) for table, at in tables(places))


def tables(places: Sequence[int]) -> Iterator[tuple[list[Any], int]]:
    """Every table of instructions that Dynamo has, with each of ``places`` in it."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    classes = [InstructionTranslatorBase]
    for cls in classes:
        classes.extend(cls.__subclasses__())
        table = cls.__dict__.get("dispatch_table")
        if isinstance(table, list):
            yield from ((table, place) for place in places if place < len(table))


def _knowing_outcome(jump: Callable[..., Any]) -> Callable[..., Any]:
    """A conditional jump of Dynamo's, on a plain bool where the tensor that decides is known."""

    @functools.wraps(jump)
    def known_jump(self: Any, instruction: Any) -> Any:
        try:
            outcome = _outcome(self.stack[-1])
            if outcome is not None:
                from torch._dynamo.variables.constant import ConstantVariable

                self.stack[-1] = ConstantVariable.create(outcome)
        except Exception as error:  # noqa: BLE001  (Dynamo's own way remains)
            log.debug("a branch was left to Dynamo: %s", error)
        return jump(self, instruction)

    return known_jump


def _outcome(variable: Any) -> bool | None:
    proxy = getattr(variable, "proxy", None)
    node = getattr(proxy, "node", None)
    value = node_value(node) if isinstance(node, fx.Node) else None
    if node is None or not isinstance(value, torch.Tensor) or value.numel() != 1:
        return None
    compare = _COMPARISONS.get(operator_name(node))
    if compare is None or len(node.args) != 2:
        return None
    difference = linear_difference(*node.args)
    if difference is None:
        return None
    total = sum(count * (1 if key is None else node_value(key)) for key, count in difference.items())
    return bool(compare(total, 0))
