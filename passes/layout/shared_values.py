"""Fake tensors that stand for all nodes with the same abstract value, and keys for computations on them."""

from __future__ import annotations

from typing import Any

import torch

from svg2_compile.passes.layout.axes import Axes
from svg2_compile.passes.layout.lengths import size_expr
from svg2_compile.passes.layout.mode import LayoutMode
from svg2_compile.passes.layout.op_call import sizes_of


class Unshared(Exception):
    """An argument cannot be part of a key: only its identity distinguishes it."""


class SharedValues:
    """One fake tensor for every (sizes, strides, dtype, device, axes) met."""

    def __init__(self, mode: LayoutMode) -> None:
        self._mode = mode
        self._tensors: dict[Any, torch.Tensor] = {}

    def canonical(self, value: Any) -> Any:
        """The tensor that stands for all tensors like `value`; anything else as it is."""
        if not isinstance(value, torch.Tensor) or self._mode.is_shared(value):
            return value
        key = _abstract(value, self._mode.axes_of(value))
        if key not in self._tensors:
            self._mode.share(value)
            self._tensors[key] = value
        return self._tensors[key]

    def find(self, like: torch.Tensor, axes: Axes) -> torch.Tensor | None:
        """The tensor that stands for all tensors with the metadata of `like` and these axes, if there is one."""
        return self._tensors.get(_abstract(like, axes))

    def key(self, *computation: Any) -> Any:
        """A hashable key: equal keys mean equal results. None where an argument is not shared."""
        try:
            key = key_of(computation)
            hash(key)
        except (Unshared, TypeError):
            return None
        return key


def _abstract(tensor: torch.Tensor, axes: Axes) -> Any:
    conjugate = tensor.dtype.is_complex and tensor.is_conj()
    strides = tuple(size_expr(stride) for stride in tensor.stride())
    return (tuple(sizes_of(tensor)), strides, tensor.dtype, tensor.device, conjugate, axes)


def key_of(value: Any) -> Any:
    """A hashable stand-in for an argument. Raises `Unshared` for one that only its identity distinguishes."""
    if isinstance(value, torch.Tensor):
        if not LayoutMode.is_shared(value):
            raise Unshared
        return ("tensor", id(value))
    if isinstance(value, (list, tuple)):
        return (type(value), *(key_of(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, key_of(item)) for name, item in value.items()))
    if isinstance(value, slice):
        return (slice, key_of(value.start), key_of(value.stop), key_of(value.step))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    return (type(value), value)
