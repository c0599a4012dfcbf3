"""The dispatch mode that carries token layouts through ATen operators while a graph runs on fake tensors.

Every fake tensor that the mode has seen holds its axes and, if it is a view, the tensor that it views. Axes are read
and written through the mode only. An in-place write to a view is carried back to what it views (`slice` and `select`
exactly, other views as unknown); the other views of that memory are then derived again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svg2_compile.passes.layout.axes import ONE, UNKNOWN, Axes, Axis
from svg2_compile.passes.layout.data_cuts import of_known_length
from svg2_compile.passes.layout.lengths import same_length, size_expr
from svg2_compile.passes.layout.op_call import (
    OpCall,
    arguments_with_defaults,
    constant_axes,
    fit,
    is_constant,
    sizes_of,
    unknown_axes,
)
from svg2_compile.passes.layout.rules.join import replaced, replaced_by_step, start_of
from svg2_compile.passes.layout.rules.table import ATTENTION_PACKETS, SOFTMAX_PACKETS, TOKEN_MAJOR_ATTENTION, rule_for

_AXES = "_svg2_axes"
_ORIGIN = "_svg2_origin"
_STAMP = "_svg2_stamp"
_SHARED = "_svg2_shared"


class SharedValueWritten(Exception):
    """The graph writes in place to a fake tensor that stands for several nodes."""


@dataclass(frozen=True, slots=True)
class AttentionAxes:
    """Axes of one attention: query tokens, key tokens, and every source of its mask's axes and its value's tokens."""

    query: Axis
    key: Axis
    mask_sources: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Origin:
    base: torch.Tensor
    call: OpCall | None


class LayoutMode(TorchDispatchMode):
    """Runs every operator and gives its outputs axes by the rules; `unruled_ops` counts operators without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.unruled_ops: Counter[str] = Counter()
        self.attentions: dict[AttentionAxes, None] = {}
        self.data_dependent = False
        self._generation: dict[int, int] = {}

    def axes_of(self, tensor: torch.Tensor) -> Axes:
        """The axes of a tensor: constant for a real tensor, unknown for a fake one that came from nowhere."""
        axes: Axes | None = getattr(tensor, _AXES, None)
        if axes is None:
            return unknown_axes(tensor) if isinstance(tensor, FakeTensor) else constant_axes(tensor)
        if self._generation and self._generation.get(_storage(tensor), 0) != getattr(tensor, _STAMP, 0):
            return self._derive_again(tensor)
        return axes

    def _derive_again(self, tensor: torch.Tensor) -> Axes:
        """The axes of a tensor whose memory was written through another tensor."""
        origin: _Origin | None = getattr(tensor, _ORIGIN, None)
        call = None if origin is None else origin.call
        rule = None if call is None else rule_for(call.func)
        if call is None or rule is None:
            return unknown_axes(tensor)
        return rule(call)[_position(tensor, call.outputs)]

    def set_axes(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Gives a tensor its axes."""
        setattr(tensor, _AXES, axes)
        if self._generation:
            setattr(tensor, _STAMP, self._generation.get(_storage(tensor), 0))

    def declare(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Gives a view axes that no rule derives from what it views; written through it, that becomes unknown."""
        self.set_axes(tensor, axes)
        if hasattr(tensor, _ORIGIN):
            setattr(tensor, _ORIGIN, _Origin(getattr(tensor, _ORIGIN).base, None))

    def share(self, tensor: torch.Tensor) -> None:
        """Marks a tensor as standing for several nodes: writing to it raises `SharedValueWritten`."""
        setattr(tensor, _SHARED, True)

    @staticmethod
    def is_shared(tensor: torch.Tensor) -> bool:
        """Whether `share` was called for this tensor."""
        return bool(getattr(tensor, _SHARED, False))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` and records the axes of its outputs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.slice.Tensor:
            result = of_known_length(args[0], result, *args[1:], **kwargs)
        outputs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.data_dependent = True
        if outputs:
            self._record(OpCall(func, arguments_with_defaults(func, args, kwargs), outputs, self.axes_of))
        return result

    def _record(self, call: OpCall) -> None:
        schema = call.func._schema
        new_axes = self._axes_by_rule(call)
        self._note_attention(call)
        if schema.is_mutable:
            self._write(call, new_axes)
            return
        aliased = next((a.name for a in schema.arguments if a.alias_info is not None), None)
        for output, axes in zip(call.outputs, new_axes, strict=True):
            self.set_axes(output, axes)
            if aliased is not None and output is not call.args[aliased]:
                setattr(output, _ORIGIN, _Origin(call.args[aliased], call))

    def _axes_by_rule(self, call: OpCall) -> list[Axes]:
        rule = rule_for(call.func)
        if rule is None:
            self.unruled_ops[str(call.func)] += 1
            return [unknown_axes(output) for output in call.outputs]
        result = []
        for axes, output in zip(rule(call), call.outputs, strict=True):
            if len(axes) != output.dim():
                self.unruled_ops[f"{call.func} (rank)"] += 1
                result.append(unknown_axes(output))
            else:
                result.append(tuple(fit(axis, size) for axis, size in zip(axes, sizes_of(output), strict=True)))
        return result

    def _note_attention(self, call: OpCall) -> None:
        packet = call.func.overloadpacket
        if packet in ATTENTION_PACKETS:
            token = 1 if packet in TOKEN_MAJOR_ATTENTION else -2
            masks = [call.args.get(name) for name in ("attn_mask", "attn_bias", "bias")]
            found = [axis for mask in masks if isinstance(mask, torch.Tensor) for axis in self.axes_of(mask)]
            found.append(call.axes("value")[token])
            self.note_attention(call.axes("query")[token], call.axes("key")[token], found)
        elif packet in SOFTMAX_PACKETS and len(call.axes("self")) >= 3:
            self.note_attention(call.axes("self")[-2], call.axes("self")[-1], [])

    def note_attention(self, query: Axis, key: Axis, mask: list[Axis]) -> None:
        """Records the token axes of an attention."""
        sources = frozenset().union(*(axis.sources for axis in mask))
        self.attentions[AttentionAxes(query, key, sources)] = None

    def _write(self, call: OpCall, new_axes: list[Axes]) -> None:
        """In-place operators and `out=`: the written argument takes the axes of the output."""
        written = [a.name for a in call.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        axes_of_output = {id(output): axes for output, axes in zip(call.outputs, new_axes, strict=True)}
        for name in written:
            target = call.args[name]
            for tensor in target if isinstance(target, (list, tuple)) else [target]:
                if isinstance(tensor, torch.Tensor):
                    self._overwrite(tensor, axes_of_output.get(id(tensor), unknown_axes(tensor)))

    def _overwrite(self, tensor: torch.Tensor, axes: Axes) -> None:
        old_axes = self.axes_of(tensor)
        self._check_not_shared(tensor)
        if old_axes == axes:
            return
        chain: list[tuple[torch.Tensor, Axes]] = [(tensor, axes)]
        while (origin := getattr(chain[-1][0], _ORIGIN, None)) is not None:
            chain.append((origin.base, self._written_through(origin, old_axes, chain[-1][1])))
            old_axes = self.axes_of(origin.base)
        storage = _storage(tensor)
        self._generation[storage] = self._generation.get(storage, 0) + 1
        for member, member_axes in chain:
            self.set_axes(member, member_axes)

    def _check_not_shared(self, tensor: torch.Tensor) -> None:
        member: torch.Tensor | None = tensor
        while member is not None:
            if getattr(member, _SHARED, False):
                raise SharedValueWritten
            origin = getattr(member, _ORIGIN, None)
            member = origin.base if origin is not None else None

    def _written_through(self, origin: _Origin, old_axes: Axes, axes: Axes) -> Axes:
        """The axes of a view's base after the view was overwritten with `axes`."""
        base = self.axes_of(origin.base)
        if old_axes == axes or (is_constant(base) and is_constant(axes)):
            return base
        call = origin.call
        if call is None:
            return tuple(UNKNOWN for _ in base)
        name = call.func._schema.name
        if name in ("aten::alias", "aten::detach", "aten::lift_fresh"):
            return axes
        if name == "aten::slice":
            dim, sizes = call.dim(), sizes_of(origin.base)
            length = sizes_of(call.outputs[0])[dim]
            if same_length(length, sizes[dim]):
                return axes
            if call.args.get("step", 1) != 1:
                return replaced_by_step(base, axes, dim, sizes[dim])
            return replaced(base, axes, dim, start_of(call, sizes[dim]), length, sizes[dim])
        if name == "aten::select":
            dim, size = call.dim(), sizes_of(origin.base)[call.dim()]
            start = size_expr(call.args["index"])
            start = start + size if start.is_negative else start
            return replaced(base, (*axes[:dim], ONE, *axes[dim:]), dim, start, sympy.Integer(1), size)
        return tuple(UNKNOWN for _ in base)


def _position(tensor: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> int:
    return next(index for index, other in enumerate(tensors) if other is tensor)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
