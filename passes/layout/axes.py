"""The domain of the token-layout analysis: where the positions of one tensor axis come from.

An axis is an ordered product of *factors* (row-major: the last factor varies fastest), so that `view` can merge axes
and split them again. A factor is a concatenation of *segments*. A segment is a run of positions that derive from one
set of graph inputs. Example: a batch of 2 videos with 8 text tokens before 32 video tokens each, flattened together:

    Axis((({hidden_states, text}: 2),), (({text}: 8), ({hidden_states}: 32)))

Everything here is a pure function of values; lengths are sympy expressions and nothing is ever guarded on: two lengths
are equal only where that can be shown. What cannot be shown becomes `UNKNOWN`, never a guess; a segment whose positions
come from several segments in an order that is not known carries the source `MIXED` besides theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch

from svg2_compile.passes.layout.lengths import (
    Undecided,
    exact_quotient,
    longer,
    same_length,
    shorter,
    size_expr,
)
from svg2_compile.passes.layout.marks import without_picks


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of positions. `sources`: names of the non-parameter graph inputs that it derives from; empty = constant."""

    sources: frozenset[str]
    length: sympy.Expr


Factor = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """An ordered product of factors; `None` = unknown; `()` = length 1."""

    factors: tuple[Factor, ...] | None

    @property
    def known(self) -> bool:
        """Whether anything is known about the positions of this axis."""
        return self.factors is not None

    @property
    def length(self) -> sympy.Expr | None:
        """The number of positions; None where the axis is unknown."""
        if self.factors is None:
            return None
        return sympy.Mul(*(factor_length(factor) for factor in self.factors))

    @property
    def sources(self) -> frozenset[str]:
        """Every graph input that some position of this axis derives from; empty where the axis is unknown."""
        return frozenset().union(*(s.sources for f in self.factors or () for s in f))


Axes = tuple[Axis, ...]
MIXED = "<mixed>"
"""The source that marks a segment of positions from several segments in unknown order. No input has this name."""
NO_SOURCES: frozenset[str] = frozenset()
MOST_SEGMENTS = 256
"""So many runs an axis may have. Text between the shards of a video on 64 ranks makes 128."""


class Inside(str):
    """The source that marks the inner positions of a concatenation that was split: [text: 6 | video: 24] as [5, 6].

    Alone they come from any of its segments. Inside of the very outer positions that kept the boundaries, they come
    from what these come from.
    """

    __slots__ = ("factor",)
    factor: Factor

    @classmethod
    def of(cls, factor: Factor) -> Inside:
        """The mark of positions inside of `factor`."""
        mark = cls("<inside " + "|".join(f"{'+'.join(sorted(s.sources))}:{s.length}" for s in factor) + ">")
        mark.factor = factor
        return mark

    def is_inside(self, outer: Factor) -> bool:
        """Whether `outer` is the factor, whatever was added to its sources since."""
        return len(outer) == len(self.factor) and all(
            mine.sources <= other.sources and same_length(mine.length, other.length)
            for mine, other in zip(self.factor, outer, strict=True)
        )


UNKNOWN = Axis(None)
ONE = Axis(())


def factor_length(factor: Factor) -> sympy.Expr:
    """The number of positions of a concatenation."""
    return sympy.Add(*(segment.length for segment in factor))


def make_axis(factors: Iterable[Factor]) -> Axis:
    """The normal form: no factor of length 1, no empty segment, no two neighbours that could be one."""
    result: list[Factor] = []
    for factor in factors:
        factor = _join_segments(factor)
        if len(factor) == 1 and factor[0].length == 1:
            continue
        if result and len(factor) == 1 and len(result[-1]) == 1 and factor[0].sources == result[-1][0].sources:
            outer = result.pop()[0]
            factor = (Segment(outer.sources, outer.length * factor[0].length),)
        result.append(factor)
        if len(result) > 1 and (joined := _joined_again(*result[-2:])) is not None:
            result[-2:] = [joined]
    return Axis(tuple(result))


def _joined_again(outer: Factor, inner: Factor) -> Factor | None:
    """A concatenation that was split into `outer` and `inner`, as one again; None where they are none."""
    marks = [source for source in inner[0].sources if isinstance(source, Inside)] if len(inner) == 1 else []
    for mark in marks:
        if mark.is_inside(outer):
            added = inner[0].sources - blend(mark.factor) - {mark}
            length = inner[0].length
            return tuple(Segment(s.sources | added, sympy.expand(s.length * length)) for s in outer)
    return None


def _join_segments(segments: Iterable[Segment]) -> Factor:
    result: list[Segment] = []
    for segment in segments:
        if segment.length == 0:
            continue
        if result and result[-1].sources == segment.sources:
            segment = Segment(segment.sources, result.pop().length + segment.length)
        result.append(segment)
    return tuple(result)


def single(sources: Iterable[str], length: int | torch.SymInt | sympy.Expr) -> Axis:
    """An axis of one segment."""
    return make_axis([(Segment(frozenset(sources), size_expr(length)),)])


def constant(length: int | torch.SymInt | sympy.Expr) -> Axis:
    """An axis whose positions derive from no graph input."""
    return single(NO_SOURCES, length)


def blended_sources(axis: Axis) -> frozenset[str] | None:
    """The sources of positions taken from anywhere on the axis, `MIXED` where they differ; None if unknown."""
    return None if axis.factors is None else NO_SOURCES.union(*map(blend, axis.factors))


def blend(factor: Factor) -> frozenset[str]:
    """The sources of positions taken from anywhere on a concatenation, `MIXED` where they differ.

    Constants count as nothing: a padded video that is resampled is a video.
    """
    different = {without_picks(segment.sources) for segment in factor} - {NO_SOURCES}
    return NO_SOURCES.union(*different, {MIXED} if len(different) > 1 else ())


def has_boundary(axis: Axis) -> bool:
    """Whether the axis is known and some factor of it has more than one segment."""
    return any(len(factor) > 1 for factor in axis.factors or ())


def collapse(axis: Axis) -> Factor | None:
    """The axis as one concatenation; None if unknown.

    A boundary inside an inner factor stands in every position of the outer ones: [2 x (text: 4 | video: 16)] is
    [text: 4 | video: 16 | text: 4 | video: 16]. Where these are too many or not a known number, or the outer ones have
    sources of their own (a batch), it is one mixed segment.
    """
    if axis.factors is None:
        return None
    *outer, result = axis.factors or ((Segment(NO_SOURCES, sympy.Integer(1)),),)
    for factor in reversed(outer):
        joined = _product(factor, result)
        if joined is None:
            length = axis.length
            assert length is not None  # the axis is known
            return (Segment(blended_sources(axis) or NO_SOURCES, length),)
        result = joined
    return result


def _product(outer: Factor, inner: Factor) -> Factor | None:
    """Two factors as one; None where its segments cannot be listed."""
    if len(inner) == 1:
        added, length = inner[0].sources, inner[0].length
        return _join_segments(Segment(s.sources | added, sympy.expand(s.length * length)) for s in outer)
    count = factor_length(outer)
    adds_sources = any(not run.sources <= part.sources for run in outer for part in inner)
    if adds_sources or not count.is_Integer or count * len(inner) > MOST_SEGMENTS:
        return None
    return _join_segments(inner * int(count))


def resample(axis: Axis, length: int | torch.SymInt | sympy.Expr) -> Axis:
    """The axis after positions were merged, dropped, permuted or repeated."""
    sources = blended_sources(axis)
    return UNKNOWN if sources is None else single(sources, length)


def add_sources(axis: Axis, sources: frozenset[str]) -> Axis:
    """The axis with `sources` added to every segment."""
    if axis.factors is None or not sources:
        return axis
    return make_axis(tuple(Segment(s.sources | sources, s.length) for s in factor) for factor in axis.factors)


def concat(axes: Sequence[Axis]) -> Axis:
    """The concatenation of axes; products collapse to one segment first."""
    segments: list[Segment] = []
    for axis in axes:
        factor = collapse(axis)
        if factor is None:
            return UNKNOWN
        segments.extend(factor)
    return make_axis([tuple(segments)])


def tile(axis: Axis, times: int | torch.SymInt | sympy.Expr) -> Axis:
    """The axis repeated as a whole (`repeat`): one more outer factor, which carries nothing."""
    return UNKNOWN if axis.factors is None else make_axis([*_factors(constant(times)), *axis.factors])


def interleave(axis: Axis, times: int | torch.SymInt | sympy.Expr) -> Axis:
    """Every position repeated in place (`repeat_interleave`): one more inner factor, which carries nothing."""
    return UNKNOWN if axis.factors is None else make_axis([*axis.factors, *_factors(constant(times))])


def _factors(axis: Axis) -> tuple[Factor, ...]:
    return axis.factors or ()


def flip(axis: Axis) -> Axis:
    """The axis in reverse order."""
    factors = [tuple(_moved(s, s.length) for s in reversed(factor)) for factor in axis.factors or ()]
    return UNKNOWN if axis.factors is None else make_axis(factors)


def _moved(segment: Segment, length: sympy.Expr) -> Segment:
    return Segment(without_picks(segment.sources), length)


def cut(axis: Axis, start: sympy.Expr, length: sympy.Expr) -> Axis:
    """Positions `start .. start + length` of the axis."""
    total = axis.length
    if axis.factors is None or total is None:
        return UNKNOWN
    if start == 0 and same_length(length, total):
        return axis
    if not has_boundary(axis):
        return single(without_picks(axis.sources), length)
    inner = sympy.Mul(*(factor_length(factor) for factor in axis.factors[1:]))
    outer_start, outer_length = exact_quotient(start, inner), exact_quotient(length, inner)
    if outer_start is None or outer_length is None:
        return resample(axis, length)
    try:
        first = _cut_factor(axis.factors[0], outer_start, outer_length)
    except Undecided:
        return resample(axis, length)
    return make_axis([first, *axis.factors[1:]])


def _cut_factor(factor: Factor, start: sympy.Expr, length: sympy.Expr) -> Factor:
    stop = start + length
    boundaries = list(itertools.accumulate((segment.length for segment in factor), initial=sympy.Integer(0)))
    first = next((i for i, place in enumerate(boundaries) if same_length(place, start)), None)
    last = next((i for i, place in enumerate(boundaries) if same_length(place, stop)), None)
    if first is not None and last is not None and first <= last:
        return factor[first:last]
    result = []
    for segment, (begin, end) in zip(factor, itertools.pairwise(boundaries), strict=True):
        low, high = longer(begin, start), shorter(end, stop)
        if longer(high, low) == high:
            result.append(_moved(segment, sympy.expand(high - low)))
    return tuple(result)
