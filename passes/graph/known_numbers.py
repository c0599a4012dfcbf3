"""The numbers in an integer tensor that a graph makes out of Python numbers.

    grid = torch.stack([torch.tensor([5, s0, 12])])        ->  [[5, s0, 12]], s0 being a node of the graph
    grid[0].to(device)                                      ->  [5, s0, 12]
    lengths = mask.sum(1)                                   ->  unknown: it depends on data

Model code keeps sizes in tensors and reads them back with tolist(). What is read was known all the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["MOST_NUMBERS", "known_numbers"]

MOST_NUMBERS = 256
"""Of one tensor. What holds more is data."""

_MADE_NAMES = "tensor as_tensor LongTensor IntTensor"
_COPY_NAMES = "to long int cuda cpu type type_as clone detach contiguous alias lift_fresh_copy _to_copy"
_MOVE_NAMES = (
    "stack cat concat concatenate getitem __getitem__ unsqueeze squeeze view reshape flatten unflatten ravel expand "
    "repeat repeat_interleave transpose permute t select narrow slice flip roll unbind chunk split hstack vstack tile"
)
_COMPUTE_NAMES = (
    "add sub mul floordiv floor_divide mod remainder neg abs max min amax amin sum prod cumsum cumprod diff"
)
_WRITE_NAMES = "iadd isub imul ifloordiv imod ipow iand ior ixor"
_MADE, _COPIES, _MOVES, _COMPUTED, _WRITES = (
    frozenset(names.split()) for names in (_MADE_NAMES, _COPY_NAMES, _MOVE_NAMES, _COMPUTE_NAMES, _WRITE_NAMES)
)
_NODES_FROM = 1 << 40
"""Numbers from here on stand for nodes. Only operators that move numbers see them."""


class _Unknown(Exception):
    """Not made of Python numbers alone."""


def known_numbers(node: fx.Node) -> Any:
    """The content of the tensor of `node` as nested lists of ints and of nodes that yield an int; None if unknown."""
    evaluation = _Evaluation()
    try:
        with _disable_current_modes():
            return evaluation.decoded(evaluation.tensor(node).tolist())
    except _Unknown:
        return None


class _Evaluation:
    def __init__(self) -> None:
        self._nodes: list[fx.Node] = []
        self._tensors: dict[fx.Node, torch.Tensor] = {}

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The numbers of a node, as int64 whatever its dtype is."""
        if node not in self._tensors:
            self._tensors[node] = self._evaluate(node)
        return self._tensors[node]

    def decoded(self, numbers: Any) -> Any:
        """Nested lists with nodes in the place of what stands for them."""
        if isinstance(numbers, list):
            return [self.decoded(number) for number in numbers]
        return self._nodes[numbers - _NODES_FROM] if numbers >= _NODES_FROM else numbers

    def _evaluate(self, node: fx.Node) -> torch.Tensor:
        fake, name = node_value(node), operator_name(node)
        if not _is_small_integer_tensor(fake) or any(_writes(user) for user in node.users):
            raise _Unknown
        if name in _MADE:
            result = self._made(node.args[0] if node.args else node.kwargs.get("data"))
        elif name in _COPIES:
            result = self._operand(node.args[0])
        elif name in _MOVES | _COMPUTED:
            result = self._run(node, name in _COMPUTED)
        else:
            raise _Unknown
        if list(result.shape) != list(fake.shape):
            raise _Unknown
        return result

    def _made(self, numbers: Any) -> torch.Tensor:
        if isinstance(numbers, fx.Node) and isinstance(node_value(numbers), torch.Tensor):
            return self.tensor(numbers)
        return torch.tensor(self._encoded(numbers), dtype=torch.int64)

    def _encoded(self, numbers: Any) -> Any:
        if isinstance(numbers, (list, tuple)):
            return [self._encoded(number) for number in numbers]
        if isinstance(numbers, int) and abs(numbers) < _NODES_FROM:
            return int(numbers)
        if isinstance(numbers, fx.Node) and isinstance(node_value(numbers), (int, torch.SymInt)):
            self._nodes.append(numbers)
            return _NODES_FROM + len(self._nodes) - 1
        if isinstance(numbers, fx.Node):
            value = node_value(numbers)
            if isinstance(value, torch.Tensor):
                return self.tensor(numbers).tolist()
            if numbers.target in (torch.Size, tuple, list):
                return self._encoded(numbers.args[0])
            if isinstance(value, torch.Size):
                read = {user.args[1]: user for user in numbers.users if operator_name(user) == "getitem"}
                return [self._encoded(n if isinstance(n, int) else read.get(i)) for i, n in enumerate(value)]
        raise _Unknown

    def _run(self, node: fx.Node, computes: bool) -> torch.Tensor:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "device")}
        try:
            result = (
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
                if node.op == "call_method"
                else (
                    node.target(*args, **kwargs)  # type: ignore[operator]
                )
            )
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
            raise _Unknown from error
        if not isinstance(result, torch.Tensor) or result.numel() > MOST_NUMBERS:
            raise _Unknown
        has_nodes = any(bool((operand >= _NODES_FROM).any()) for operand in operands)
        if computes and has_nodes and not _is_of_one(operands, result):
            raise _Unknown
        return result.to(torch.int64)

    def _operand(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        value = node_value(argument)
        if isinstance(value, torch.Tensor):
            return self.tensor(argument)
        if isinstance(value, int) and not isinstance(value, torch.SymInt):
            return value
        raise _Unknown


def _is_of_one(operands: list[torch.Tensor], result: torch.Tensor) -> bool:
    """max, sum ... of a single number are that number."""
    return len(operands) == 1 and operands[0].numel() == result.numel() == 1 and bool((operands[0] == result).all())


def _is_small_integer_tensor(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in value.shape):
        return False
    is_integer = not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)
    return is_integer and value.numel() <= MOST_NUMBERS


def _writes(user: fx.Node) -> bool:
    """Whether a user may write to what it is given: setitem, an operator whose name ends in _, iadd ..."""
    name = operator_name(user)
    return name.startswith("setitem") or (name.endswith("_") and not name.endswith("__")) or name in _WRITES
