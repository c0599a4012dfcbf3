"""Functions run on fake tensors whose axes have names, and axes written as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from svg2_compile.passes.layout.axes import MIXED, Axes, Axis, Inside, Segment, constant, make_axis
from svg2_compile.passes.layout.mode import LayoutMode

Spec = tuple[str, ...]


def axis_of(text: str) -> Axis:
    """`"video:8|text:4"`, `"2"`, `"batch:2x(video:8|text:4)"`: factors by x, segments by |."""
    factors = []
    for factor in text.split(" x "):
        segments = []
        for part in factor.split("|"):
            names, _, length = part.rpartition(":")
            segments.append(Segment(frozenset(n for n in names.split("+") if n), torch.sym_int(int(length))))
        factors.append(tuple(Segment(s.sources, constant_length(int(s.length))) for s in segments))
    return make_axis(factors)


def constant_length(length: int) -> Any:
    return constant(length).length


def written(axis: Axis) -> str:
    """The inverse of `axis_of`; `?` = unknown, `~` marks a mixed segment."""
    if axis.factors is None:
        return "?"
    factors = []
    for factor in axis.factors:
        parts = []
        for s in factor:
            names = "+".join(sorted(source for source in s.sources - {MIXED} if not isinstance(source, Inside)))
            mark = "~" if MIXED in s.sources else ""
            parts.append(f"{mark}{names}:{s.length}" if names or mark else str(s.length))
        factors.append("|".join(parts) or "0")
    return " x ".join(factors) or "1"


def analyse(function: Callable[..., Any], *specs: Spec | Tensor) -> tuple[Any, LayoutMode]:
    """Runs `function` on fake tensors with the given axes. Returns its result and the mode."""
    mode = LayoutMode()
    with FakeTensorMode(), torch.no_grad(), mode:
        arguments = []
        for spec in specs:
            axes = tuple(axis_of(text) for text in spec)
            tensor = torch.empty([int(axis.length or 0) for axis in axes])
            mode.set_axes(tensor, axes)
            arguments.append(tensor)
        return function(*arguments), mode


def layouts(function: Callable[..., Any], *specs: Spec) -> Any:
    result, mode = analyse(function, *specs)
    assert not mode.unruled_ops
    if isinstance(result, (list, tuple)):
        return [spelled(mode.axes_of(tensor)) for tensor in result]
    return spelled(mode.axes_of(result))


def spelled(axes: Axes) -> Spec:
    return tuple(written(axis) for axis in axes)


JOINT = ("b:2", "video:8|text:4", "c:6")
VIDEO = ("b:2", "video:8", "c:6")
IMAGE = ("b:2", "c:4", "h:8", "w:6")
