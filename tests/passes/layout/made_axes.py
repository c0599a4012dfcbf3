"""Axes to test with: made of parts, drawn at random, and read position by position."""

from __future__ import annotations

import itertools

import sympy
from hypothesis import strategies as st

from svg2_compile.passes.layout.axes import Axis, Segment, make_axis

N = sympy.Symbol("s0", integer=True, positive=True)
T = sympy.Symbol("s1", integer=True, positive=True)
TEXT, VIDEO, ROPE = frozenset({"text"}), frozenset({"video"}), frozenset({"rope"})


def segment(name: str, length: sympy.Expr | int) -> Segment:
    return Segment(frozenset(name.split("+")) if name else frozenset(), sympy.sympify(length))


def joint(*parts: tuple[str, sympy.Expr | int]) -> Axis:
    """An axis of one factor."""
    return make_axis([tuple(segment(name, length) for name, length in parts)])


def positions(axis: Axis) -> list[frozenset[str]]:
    """The sources of every position of a known axis of static length."""
    assert axis.factors is not None
    per_factor = [[s.sources for s in factor for _ in range(int(s.length))] for factor in axis.factors]
    return [frozenset().union(*combination) for combination in itertools.product(*per_factor)]


segments = st.lists(
    st.tuples(st.sampled_from(["", "video", "text", "rope", "video+rope"]), st.integers(1, 6)), min_size=1, max_size=3
)
axes = st.lists(segments, min_size=0, max_size=2).map(
    lambda factors: make_axis(tuple(segment(name, length) for name, length in factor) for factor in factors)
)


def is_padded(axis: Axis) -> bool:
    """Whether constants stand beside other segments: merged with these they count as the same."""
    return any(len(factor) > 1 and any(not s.sources for s in factor) for factor in axis.factors or ())
