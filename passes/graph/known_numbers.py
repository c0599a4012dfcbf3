"""The numbers in an integer tensor that a graph makes out of Python numbers.

    grid = torch.stack([torch.tensor([5, s0, 12])])          ->  [[5, s0, 12]], s0 being a node of the graph
    starts = torch.arange(3) * s0                             ->  [0, s0, 2 * s0]
    lengths = mask.sum(1)                                     ->  unknown: it depends on data

Model code keeps sizes in tensors: it reads them back with tolist(), or hands them to an attention as the starts of its
sequences. What is in them was known all the time. Every tensor is a sum of real tensors, one for plain numbers and one
for the coefficients of each node; what moves and adds numbers is run on each of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from svg2_compile.passes.graph.nodes import is_written, may_write, operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["MOST_NUMBERS", "known_numbers", "linear_difference", "linear_numbers"]

MOST_NUMBERS = 256
"""Of one tensor. What holds more is data."""

_COPY_NAMES = "to long int cuda cpu type type_as clone detach contiguous alias lift_fresh_copy _to_copy"
_MOVE_NAMES = (
    "stack cat concat concatenate getitem __getitem__ unsqueeze squeeze view reshape flatten unflatten ravel expand "
    "repeat repeat_interleave transpose permute t select narrow slice flip roll unbind chunk split hstack vstack tile "
    "neg sum cumsum diff"
)
_OTHER_NAMES = "floordiv floor_divide mod remainder abs max min amax amin minimum maximum prod cumprod"
_FACTORIES = frozenset({"arange", "zeros", "ones", "full", "new_zeros", "new_ones", "zeros_like", "ones_like"})
_MADE = frozenset({"tensor", "as_tensor", "LongTensor", "IntTensor"})
_COPIES, _LINEAR, _OTHERS = (frozenset(names.split()) for names in (_COPY_NAMES, _MOVE_NAMES, _OTHER_NAMES))
_ADD, _MULTIPLY = {"add": 1, "radd": 1, "sub": -1}, frozenset({"mul", "rmul"})

Linear = dict[fx.Node | None, torch.Tensor]
"""The coefficients of every node; of None the plain numbers. All of one shape, int64."""


class _Unknown(Exception):
    """Not made of Python numbers alone."""


def known_numbers(node: fx.Node) -> Any:
    """The content of the tensor of `node` as nested lists of ints and of nodes that yield an int; None if unknown."""

    def one(terms: dict[fx.Node | None, int]) -> int | fx.Node:
        plain = terms.pop(None, 0)
        if not terms:
            return plain
        if plain == 0 and list(terms.values()) == [1]:
            return next(key for key in terms if key is not None)
        raise _Unknown

    return _numbers(node, one)


def linear_numbers(node: fx.Node) -> Any:
    """The content of the tensor of `node` as nested lists of {node: coefficient}, plain numbers under None."""
    return _numbers(node, lambda terms: terms)


def linear_difference(left: Any, right: Any) -> dict[fx.Node | None, int] | None:
    """`left - right` of two single numbers (nodes of tensors or of sizes, or ints) as {node: coefficient}, or None."""
    evaluation = _Evaluation()
    try:
        with _disable_current_modes():
            difference = _added(evaluation.made(left), evaluation.made(right), -1)
            return {key: int(part) for key, part in difference.items() if int(part) != 0}
    except (_Unknown, RuntimeError, ValueError):
        return None


def _numbers(node: fx.Node, read: Callable[[dict[fx.Node | None, int]], Any]) -> Any:
    def nested(parts: dict[fx.Node | None, Any]) -> Any:
        length = next((len(part) for part in parts.values() if isinstance(part, list)), None)
        if length is None:
            return read({key: number for key, number in parts.items() if number != 0})
        return [nested({key: part[index] for key, part in parts.items()}) for index in range(length)]

    try:
        with _disable_current_modes():
            linear = _Evaluation().tensor(node)
            return nested({key: tensor.tolist() for key, tensor in linear.items()})
    except _Unknown:
        return None


class _Evaluation:
    def __init__(self) -> None:
        self._tensors: dict[fx.Node, Linear] = {}

    def tensor(self, node: fx.Node) -> Linear:
        """The numbers of a node, as int64 whatever its dtype is."""
        if node not in self._tensors:
            fake = node_value(node)
            if not _is_small_integer_tensor(fake):
                raise _Unknown
            try:
                result = self._written(self._evaluate(node, operator_name(node)), _writes_to(node))
            except (TypeError, RuntimeError, ValueError, IndexError, AttributeError, KeyError) as error:
                raise _Unknown from error
            if any(list(part.shape) != list(fake.shape) for part in result.values()):
                raise _Unknown
            self._tensors[node] = result
        return self._tensors[node]

    def _evaluate(self, node: fx.Node, name: str) -> Linear:
        if name in _MADE:
            return self.made(node.args[0] if node.args else node.kwargs["data"])
        if name in _FACTORIES:
            return self._from_factory(node, name)
        if name in _COPIES and isinstance(node.args[0], fx.Node):
            return self.tensor(node.args[0])
        if name in _ADD:
            left, right = self._operands(node)
            return _added(left, right, _ADD[name])
        if name in _MULTIPLY:
            left, right = self._operands(node)
            plain, other = (left, right) if set(left) == {None} else (right, left)
            if set(plain) != {None}:
                raise _Unknown
            return {key: plain[None] * part for key, part in other.items()}
        if name in _LINEAR:
            return self._run(node)
        if name in _OTHERS:
            operands = [self.tensor(n) for n in node.all_input_nodes]
            only_one = len(operands) == 1 and next(iter(operands[0].values())).numel() == 1 and "m" in name
            if all(set(operand) == {None} for operand in operands) or (only_one and name in ("max", "min", "prod")):
                return self._run(node)
        raise _Unknown

    def _written(self, linear: Linear, writes: list[fx.Node]) -> Linear:
        """After `tensor[index] = numbers`."""
        for write in writes:
            _, index, numbers = write.args
            written = self.made(numbers)
            linear = {key: _part(linear, key).clone() for key in {**linear, **written}}
            for key, part in linear.items():
                part[_plain(index)] = _part(written, key)
        return linear

    def made(self, numbers: Any) -> Linear:
        """Nested lists of numbers, of nodes that yield one, and of tensors."""
        if isinstance(numbers, fx.Node) and isinstance(node_value(numbers), torch.Tensor):
            return self.tensor(numbers)
        if isinstance(numbers, fx.Node) and numbers.target in (torch.Size, tuple, list):
            return self.made(numbers.args[0])
        if isinstance(numbers, fx.Node) and isinstance(node_value(numbers), torch.Size):
            return self.made([_node_of(size, numbers.graph) for size in node_value(numbers)])
        if isinstance(numbers, fx.Node) and isinstance(node_value(numbers), (int, torch.SymInt)):
            return {None: torch.tensor(0), numbers: torch.tensor(1)}
        if isinstance(numbers, int) and not isinstance(numbers, torch.SymInt):
            return {None: torch.tensor(int(numbers))}
        if isinstance(numbers, (list, tuple)):
            return _together([self.made(number) for number in numbers], torch.stack)
        raise _Unknown

    def _from_factory(self, node: fx.Node, name: str) -> Linear:
        shape = [int(size) for size in node_value(node).shape]
        if name == "full":
            value = node.args[1] if len(node.args) > 1 else node.kwargs["fill_value"]
            return {key: part.expand(shape).clone() for key, part in self.made(value).items()}
        if name == "arange":
            limits = [argument for argument in node.args if isinstance(argument, int)]
            if len(limits) != len(node.args):
                raise _Unknown
            return {None: torch.arange(*limits)}
        return {None: (torch.ones if "ones" in name else torch.zeros)(shape, dtype=torch.int64)}

    def _operands(self, node: fx.Node) -> tuple[Linear, Linear]:
        if len(node.args) != 2 or node.kwargs:
            raise _Unknown
        return self.made(node.args[0]), self.made(node.args[1])

    def _run(self, node: fx.Node) -> Linear:
        """The operator on the plain numbers, and on the coefficients of every node."""
        sources = [n for n in node.all_input_nodes if isinstance(node_value(n), torch.Tensor)]
        if len(sources) != len(node.all_input_nodes):
            raise _Unknown  # where a node says how to move, the place of numbers is not known
        operands = {source: self.tensor(source) for source in sources}
        keys = dict.fromkeys(key for operand in operands.values() for key in operand)
        return {key: _call(node, {s: _part(operand, key) for s, operand in operands.items()}) for key in keys}


def _call(node: fx.Node, tensors: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), tensors.__getitem__)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "device")}
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        result = node.target(*args, **kwargs)
    if not isinstance(result, torch.Tensor) or result.numel() > MOST_NUMBERS:
        raise _Unknown
    return result.to(torch.int64)


def _part(linear: Linear, key: fx.Node | None) -> torch.Tensor:
    return linear[key] if key in linear else torch.zeros_like(next(iter(linear.values())))


def _together(parts: list[Linear], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Linear:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: join([_part(part, key) for part in parts]) for key in keys}


def _added(left: Linear, right: Linear, sign: int) -> Linear:
    return {key: _part(left, key) + sign * _part(right, key) for key in {**left, **right}}


def _is_small_integer_tensor(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in value.shape):
        return False
    is_integer = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
    return is_integer and value.numel() <= MOST_NUMBERS


def _writes_to(node: fx.Node) -> list[fx.Node]:
    """The assignments to places of a tensor, all of them before anybody reads it. Other writes make it unknown."""
    writes = [user for user in node.users if user.args and user.args[0] is node and may_write(user)]
    readers = [user for user in node.users if user not in writes]
    if any(operator_name(write) != "setitem" for write in writes):
        raise _Unknown
    if any(reader < write for write in writes for reader in readers) or any(map(is_written, readers)):
        raise _Unknown
    return sorted(writes)


def _plain(index: Any) -> Any:
    """An index without nodes."""
    if any(isinstance(part, fx.Node) for part in tree_leaves(index)):
        raise _Unknown
    if isinstance(index, slice) and any(isinstance(part, fx.Node) for part in (index.start, index.stop, index.step)):
        raise _Unknown
    return index


def _node_of(size: int | torch.SymInt, graph: fx.Graph) -> Any:
    """A node that yields a size; the size itself where it is a plain number."""
    if not isinstance(size, torch.SymInt):
        return size
    expr = size.node.expr
    for node in graph.nodes:
        value = node_value(node)
        if isinstance(value, torch.SymInt) and value.node.expr == expr:
            return node
    raise _Unknown
