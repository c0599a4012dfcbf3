"""Host reads (`tolist`, `item`) of tensors whose numbers are known.

Dynamo breaks a graph where a tensor becomes Python numbers, though model code reads back with tolist() what was made of
Python numbers a moment ago (the grid sizes of a rotary embedding). `passes.graph.known_numbers` finds them. A block
that is compiled alone is handed such a tensor: then `NumbersWanted` asks its caller for the numbers.

How long the longest of the sequences is that a mask leaves (flash-attn's unpad_input) is data, and only handed on to
the attention. It becomes a number that the graph computes: the graph goes on, and the attention is in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx

from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.graph.known_numbers import known_numbers
from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["MOST_NUMBERS_OF_AN_ARGUMENT", "Answerer", "NumbersWanted", "may_ask", "reading_known_numbers"]

log = get_logger()

MOST_NUMBERS_OF_AN_ARGUMENT = 32
"""Sizes and lengths are few. A mask of tokens is data."""

_COPIES = frozenset({"to", "int", "long", "cpu", "clone", "detach", "contiguous"})


@dataclass(frozen=True)
class Answerer:
    """Who answers. codes: the functions whose arguments are his. refused: what he has no numbers for."""

    codes: tuple[CodeType, ...]
    refused: frozenset[int | str] = frozenset()


may_ask: ContextVar[Answerer | None] = ContextVar("may_ask", default=None)


class NumbersWanted(BaseException):
    """The numbers in an argument are read. place: its position in ``*args``, or its name.

    No Exception, because Dynamo must not handle it.
    """

    def __init__(self, place: int | str) -> None:
        super().__init__(place)
        self.place = place


def reading_known_numbers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's ``tolist`` or ``item``, asking for known numbers first."""

    @functools.wraps(method)
    def read(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            try:
                node = self.as_proxy().node
                numbers = known_numbers(node)
                if numbers is not None:
                    return _as_variable(tx, numbers)
                _ask(node, tx.output.root_tx.f_code)
                if method.__name__ == "method_item" and _is_longest(node):
                    tx.output.fake_mode.allow_scalar_outputs = True
                    return None  # which lets Dynamo go on with the read as with any call
            except Exception as error:  # noqa: BLE001  (Dynamo's own way remains)
                log.debug("a host read was left to Dynamo: %s", error)
        return method(self, tx, *args, **kwargs)

    return read


def _is_longest(node: fx.Node) -> bool:
    """Whether a number is the largest of the sums of a mask."""
    largest = _before_copies(node)
    if operator_name(largest) not in ("max", "amax") or not isinstance(largest.args[0], fx.Node):
        return False
    sums = _before_copies(largest.args[0])
    mask = sums.args[0] if operator_name(sums) == "sum" else None
    value = node_value(mask) if isinstance(mask, fx.Node) else None
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point


def _before_copies(node: fx.Node) -> fx.Node:
    while operator_name(node) in _COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _ask(node: fx.Node, code: CodeType) -> None:
    """Raise NumbersWanted where the tensor is made of one small integer argument, and somebody answers."""
    answerer = may_ask.get()
    if answerer is None or code not in answerer.codes:
        return
    while node.op != "placeholder":
        inputs = node.all_input_nodes
        if len(inputs) != 1:
            return
        node = inputs[0]
    value = node_value(node)
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.dtype.is_floating_point:
        return
    if any(not isinstance(size, int) for size in value.shape) or value.numel() > MOST_NUMBERS_OF_AN_ARGUMENT:
        return
    place = _place(node)
    if place is not None and place not in answerer.refused:
        raise NumbersWanted(place)


def _place(node: fx.Node) -> int | str | None:
    """Which argument of the traced function a placeholder is; None if it is part of one."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "local_name", None)
    if name is not None:
        return str(name)
    base, index = getattr(source, "base", None), getattr(source, "index", None)
    if getattr(base, "local_name", None) in ("args", "kwargs") and isinstance(index, (int, str)):
        return index
    return None


def _as_variable(tx: Any, numbers: Any) -> Any:
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.tensor import SymNodeVariable

    def convert(number: Any) -> Any:
        if isinstance(number, list):
            return [convert(item) for item in number]
        if not isinstance(number, fx.Node):
            return VariableTracker.build(tx, number)
        tracer = tx.output.current_tracer
        if number.graph is not tracer.graph:
            raise ValueError("a number of another graph")
        return SymNodeVariable.create(tx, fx.Proxy(number, tracer), node_value(number))

    return VariableTracker.build(tx, convert(numbers)) if isinstance(numbers, list) else convert(numbers)
