"""Pointwise combination in the token-layout domain: the aligned union of axes of the same length.

[hidden_states: 128 | text: 12]  with  [rope: 140]        ->  [hidden_states, rope: 128 | text, rope: 12]
[2] x [tokens: 40]               with  [hidden_states: 80]  ->  both factors derive from the second as well
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import sympy

from svg2_compile.passes.layout.axes import (
    MIXED,
    ONE,
    UNKNOWN,
    Axis,
    Factor,
    Segment,
    add_sources,
    blend,
    factor_length,
    make_axis,
    single,
)
from svg2_compile.passes.layout.lengths import Undecided, exact_quotient, same_length, shorter


def union(a: Axis, b: Axis) -> Axis:
    """Position i of the result derives from position i of both axes (which have the same length)."""
    if a == b:
        return a
    if a.factors is None or b.factors is None:
        return UNKNOWN
    for one, other in ((a, b), (b, a)):
        if len(other.factors or ()) == 1 and len((other.factors or ((),))[0]) == 1:
            return add_sources(one, other.sources)
    try:
        return make_axis(_union_products(deque(a.factors), deque(b.factors)))
    except Undecided:
        length = a.length
        assert length is not None  # the axis is known
        return single(a.sources | b.sources | {MIXED}, length)


def _union_products(left: deque[Factor], right: deque[Factor]) -> list[Factor]:
    result = []
    while left and right:
        f, g = left.popleft(), right.popleft()
        f_length, g_length = factor_length(f), factor_length(g)
        if not same_length(f_length, g_length):
            if exact_quotient(f_length, g_length) is None:
                f, g, left, right = g, f, right, left
            f, rest = _split_factor(f, factor_length(g))
            left.appendleft(rest)
        result.append(_union_segments(deque(f), deque(g)))
    if left or right:
        raise Undecided
    return result


def _split_factor(factor: Factor, outer: sympy.Expr) -> tuple[Factor, Factor]:
    """A factor of one segment as a product `outer x rest`. Raises `Undecided` for a concatenation."""
    rest = exact_quotient(factor_length(factor), outer)
    if rest is None or len(factor) != 1:
        raise Undecided
    return (Segment(factor[0].sources, outer),), (Segment(factor[0].sources, rest),)


def _union_segments(left: deque[Segment], right: deque[Segment]) -> Factor:
    """Both concatenations cut at the boundaries of both; what lies between boundaries of unknown order is mixed."""
    before = _common_run(left, right, from_end=False)
    after = _common_run(left, right, from_end=True)
    if not left and not right:
        return (*before, *after)
    sources = blend(tuple(left)) | blend(tuple(right))
    return (*before, Segment(sources, sympy.expand(factor_length(tuple(left or right)))), *after)


def _common_run(left: deque[Segment], right: deque[Segment], from_end: bool) -> list[Segment]:
    """Takes the segments off one end of both for as long as the order of their boundaries is known."""
    result: list[Segment] = []
    end = -1 if from_end else 0
    while left and right:
        a, b = left[end], right[end]
        try:
            shared = shorter(a.length, b.length)
        except Undecided:
            break
        for side, segment in ((left, a), (right, b)):
            if same_length(segment.length, shared):
                side.pop() if from_end else side.popleft()
            else:
                side[end] = Segment(segment.sources, sympy.expand(segment.length - shared))
        result.append(Segment(a.sources | b.sources, shared))
    return result[::-1] if from_end else result


def union_all(axes: Iterable[Axis]) -> Axis:
    """The union of any number of axes of the same length; `ONE` for none."""
    result: Axis | None = None
    for axis in axes:
        result = axis if result is None else union(result, axis)
    return ONE if result is None else result
