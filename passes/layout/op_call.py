"""One ATen operator call as the token-layout rules see it: arguments by schema name, and the axes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch._ops import OpOverload, OpOverloadPacket

from svg2_compile.passes.layout.axes import ONE, UNKNOWN, Axes, Axis, constant, resample
from svg2_compile.passes.layout.lengths import same_length, size_expr

AxesLookup = Callable[[torch.Tensor], Axes]


@dataclass(frozen=True, slots=True)
class OpCall:
    """An operator, its arguments by schema name (defaults filled in), its tensor results, and the axes of tensors."""

    func: OpOverload
    args: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]
    axes_of: AxesLookup

    def axes(self, name: str) -> Axes:
        """The axes of the tensor argument `name`."""
        return self.axes_of(self.args[name])

    def sizes(self, name: str) -> list[sympy.Expr]:
        """The sizes of the tensor argument `name`."""
        return sizes_of(self.args[name])

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """The dimension argument `name` counted from the front of the tensor argument `of`."""
        rank = max(self.args[of].dim(), 1)
        return int(int(self.args[name]) % rank)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensor arguments, those inside lists too."""
        for value in self.args.values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, torch.Tensor))


Rule = Callable[[OpCall], list[Axes]]
"""A rule gives the axes of every output of a call, in order; its in-place twin shares it."""

RuleTable = dict[OpOverloadPacket, Rule]


def packets(names: str) -> list[OpOverloadPacket]:
    """The ATen operators of these names that this version of torch has."""
    aten = torch.ops.aten
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


def table(names: str, rule: Rule) -> RuleTable:
    """A rule table that gives every named ATen operator the same rule."""
    return dict.fromkeys(packets(names), rule)


@lru_cache(maxsize=1024)
def _parameters_of(func: OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


def arguments_with_defaults(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by schema name, with the defaults of those that were not given."""
    parameters = _parameters_of(func)
    bound = dict(parameters)
    bound.update(zip((name for name, _ in parameters), args, strict=False))
    bound.update(kwargs)
    return bound


def sizes_of(tensor: torch.Tensor) -> list[sympy.Expr]:
    """The sizes of a tensor as sympy expressions."""
    return [size_expr(size) for size in tensor.shape]


def constant_axes(tensor: torch.Tensor) -> Axes:
    """The axes of a tensor that derives from no graph input."""
    return tuple(constant(size) for size in tensor.shape)


def unknown_axes(tensor: torch.Tensor) -> Axes:
    """The axes of a tensor about which nothing is known, except that an axis of one position carries nothing."""
    return tuple(ONE if size == 1 else UNKNOWN for size in sizes_of(tensor))


def fit(axis: Axis, size: sympy.Expr) -> Axis:
    """The axis if it has `size` positions; nothing for one position; resampled where the length differs."""
    if size == 1:
        return ONE
    length = axis.length
    if length is None:
        return UNKNOWN
    return axis if same_length(length, size) else resample(axis, size)


def sources_of(axes: Iterable[Axis]) -> frozenset[str]:
    """Every graph input that some known axis derives from."""
    return frozenset().union(*(axis.sources for axis in axes))


def is_constant(axes: Iterable[Axis]) -> bool:
    """Whether all axes are known and derive from no graph input."""
    return all(axis.known and not axis.sources for axis in axes)
