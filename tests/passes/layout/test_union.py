"""The union of two axes, checked position by position."""

from __future__ import annotations

import math

from hypothesis import given, settings

from svg2_compile.passes.layout.axes import MIXED, UNKNOWN, Axis, single, tile
from svg2_compile.passes.layout.union import union
from tests.passes.layout.made_axes import VIDEO, N, T, axes, joint, positions


def test_union_refines_both_segmentations() -> None:
    tokens = joint(("video", 128), ("text", 12))
    assert union(tokens, joint(("rope", 140))) == joint(("video+rope", 128), ("text+rope", 12))
    assert union(tokens, joint(("rope", 130), ("", 10))) == joint(("video+rope", 128), ("text+rope", 2), ("text", 10))


def test_union_with_symbolic_boundaries() -> None:
    tokens = joint(("video", 64 * N), ("text", T))
    assert union(tokens, joint(("rope", 64 * N + T))) == joint(("video+rope", 64 * N), ("text+rope", T))
    assert union(tokens, joint(("rope", 64 * N), ("", T))) == joint(("video+rope", 64 * N), ("text", T))


def test_union_mixes_only_what_lies_between_boundaries_of_unknown_order() -> None:
    # Two videos whose numbers of valid text tokens are data: [video | text | padding] twice.
    first = joint(("video", 8), ("text", N), ("", 16 - N), ("audio", 4))
    second = joint(("video", 8), ("text", T), ("", 16 - T), ("audio", 4))
    assert union(first, second) == joint(("video", 8), ("text", 16), ("audio", 4))


def test_union_with_unknown_is_unknown() -> None:
    assert union(UNKNOWN, single(VIDEO, 4)) == UNKNOWN


@given(axes, axes)
@settings(max_examples=150, deadline=None)
def test_union_is_the_union_of_every_position(a: Axis, b: Axis) -> None:
    length = math.lcm(int(a.length or 1), int(b.length or 1))
    a, b = tile(a, length // int(a.length or 1)), tile(b, length // int(b.length or 1))
    result = positions(union(a, b))
    expected = [x | y for x, y in zip(positions(a), positions(b), strict=True)]
    for got, wanted in zip(result, expected, strict=True):
        assert got == wanted or (MIXED in got and wanted <= got)
