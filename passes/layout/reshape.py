"""`view` and `reshape` in the token-layout domain: merge and split axes at the boundaries of their factors.

    before   [B: 2] [text|video: 40] [channel: 16]      reshape(80, 4, 4)
    after    [B: 2 x text|video: 40] [channel: 4] [channel: 4]     and back again by reshape(2, 40, 16)

A factor of one segment may be split anywhere. A concatenation that is split mixes its segments, except that the outer
part keeps boundaries that are multiples of the inner one. Sizes that do not fit make the axes unknown that would need
it, and only these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from svg2_compile.passes.layout.axes import (
    ONE,
    UNKNOWN,
    Axes,
    Axis,
    Factor,
    Inside,
    Segment,
    blend,
    factor_length,
    make_axis,
)
from svg2_compile.passes.layout.lengths import exact_quotient, same_length


@dataclass(frozen=True, slots=True)
class _Piece:
    """A factor in the flat row-major order of all factors; `factor` None = unknown positions."""

    factor: Factor | None
    length: sympy.Expr


def reshape(axes: Axes, sizes: Sequence[sympy.Expr], new_sizes: Sequence[sympy.Expr]) -> Axes:
    """The axes of a tensor with `axes` and `sizes` after a reshape to `new_sizes` (row-major, same element count)."""
    if any(size == 0 for size in sizes):
        return tuple(ONE if size == 1 else UNKNOWN for size in new_sizes)
    pieces = deque(_flatten(axes, sizes))
    result: list[Axis] = []
    while len(result) < len(new_sizes):
        size = new_sizes[len(result)]
        taken = _take(pieces, size)
        if isinstance(taken, Axis):
            result.append(taken)
            continue
        spoilt = _resynchronise(taken, pieces, new_sizes[len(result) :])
        result.extend([UNKNOWN] * spoilt)
    return tuple(ONE if size == 1 else axis for axis, size in zip(result, new_sizes, strict=True))


def _flatten(axes: Axes, sizes: Sequence[sympy.Expr]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for axis, size in zip(axes, sizes, strict=True):
        if axis.factors is None:
            pieces.append(_Piece(None, size))
        else:
            pieces.extend(_Piece(factor, factor_length(factor)) for factor in axis.factors)
    return [piece for piece in pieces if piece.length != 1]


def _take(pieces: deque[_Piece], size: sympy.Expr) -> Axis | sympy.Expr:
    """Takes `size` positions off the front. Where sizes do not fit, the number of positions taken off so far."""
    need, parts = size, list[Factor | None]()
    while need != 1:
        if not pieces:
            return sympy.cancel(size / need)
        piece = pieces.popleft()
        if same_length(piece.length, need):
            parts.append(piece.factor)
            break
        if (inner := exact_quotient(piece.length, need)) is not None:
            outer_piece, inner_piece = _split(piece, need, inner)
            parts.append(outer_piece.factor)
            pieces.appendleft(inner_piece)
            break
        if (rest := exact_quotient(need, piece.length)) is None:
            return sympy.cancel(size / need) * piece.length
        parts.append(piece.factor)
        need = rest
    known = [part for part in parts if part is not None]
    return make_axis(known) if len(known) == len(parts) else UNKNOWN


def _split(piece: _Piece, outer: sympy.Expr, inner: sympy.Expr) -> tuple[_Piece, _Piece]:
    factor = piece.factor
    if factor is None:
        return _Piece(None, outer), _Piece(None, inner)
    if len(factor) == 1:
        sources = factor[0].sources
        return _Piece((Segment(sources, outer),), outer), _Piece((Segment(sources, inner),), inner)
    lengths = [exact_quotient(segment.length, inner) for segment in factor]
    segments = tuple(
        Segment(segment.sources, length) for segment, length in zip(factor, lengths, strict=True) if length is not None
    )
    # The outer positions keep the boundaries where every segment is a whole number of them; the inner ones mix.
    mixed = blend(factor)
    if len(segments) < len(factor):
        return _Piece((Segment(mixed, outer),), outer), _Piece((Segment(mixed, inner),), inner)
    return _Piece(segments, outer), _Piece((Segment(mixed | {Inside.of(segments)}, inner),), inner)


def _resynchronise(taken: sympy.Expr, pieces: deque[_Piece], sizes: Sequence[sympy.Expr]) -> int:
    """How many of `sizes` are lost until both sides have covered the same number of positions again."""
    wanted = sizes[0]
    lost = 1
    while not same_length(taken, wanted):
        behind = exact_quotient(wanted, taken) is not None or (taken - wanted).is_negative
        if behind and pieces:
            taken *= pieces.popleft().length
        elif lost < len(sizes):
            wanted *= sizes[lost]
            lost += 1
        else:
            break
    return lost
