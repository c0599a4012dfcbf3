"""The token-layout domain, checked position by position against what the operations mean."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.passes.layout.axes import (
    MIXED,
    ONE,
    UNKNOWN,
    Axis,
    collapse,
    concat,
    constant,
    cut,
    flip,
    interleave,
    make_axis,
    resample,
    single,
    tile,
)
from svg2_compile.passes.layout.lengths import exact_quotient
from tests.passes.layout.made_axes import TEXT, VIDEO, N, T, axes, is_padded, joint, positions, segment


def test_normal_form_merges_neighbours_and_drops_ones() -> None:
    assert make_axis([(segment("video", 1),), (segment("video", 4),), (segment("video", 3),)]) == single(VIDEO, 12)
    assert make_axis([(segment("video", 4), segment("video", 3), segment("text", 0))]) == single(VIDEO, 7)
    assert single(VIDEO, 1) == ONE
    assert constant(0).length == 0


def test_cut_at_boundaries_and_inside_segments() -> None:
    tokens = joint(("text", 8), ("video", 32))
    assert cut(tokens, sympy.Integer(8), sympy.Integer(32)) == single(VIDEO, 32)
    assert cut(tokens, sympy.Integer(6), sympy.Integer(4)) == joint(("text", 2), ("video", 2))


def test_cut_with_symbolic_boundaries() -> None:
    tokens = joint(("text", T), ("video", 16 * N))
    assert cut(tokens, T, 16 * N) == single(VIDEO, 16 * N)
    assert cut(tokens, sympy.Integer(0), T) == single(TEXT, T)
    undecidable = cut(tokens, N, sympy.Integer(3))
    assert undecidable == single({"text", "video", MIXED}, 3)


@given(axes, st.data())
@settings(max_examples=150, deadline=None)
def test_cut_keeps_the_positions_that_it_names(axis: Axis, data: st.DataObject) -> None:
    total = int(axis.length or 1)
    start = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - start))
    outer = sum(int(s.length) for s in axis.factors[0]) if axis.factors else 1
    one_outer_position = length * outer <= total  # an axis of one position carries nothing
    result = positions(cut(axis, sympy.Integer(start), sympy.Integer(length)))
    for got, wanted in zip(result, positions(axis)[start : start + length], strict=True):
        padding = is_padded(axis) and wanted <= got <= axis.sources
        assert got == wanted or padding or (MIXED in got and wanted <= got) or (one_outer_position and got <= wanted)


def test_concat_keeps_boundaries() -> None:
    assert concat([single(TEXT, 8), single(VIDEO, 32)]) == joint(("text", 8), ("video", 32))
    assert concat([single(TEXT, 8), UNKNOWN]) == UNKNOWN


def test_collapse_of_a_product_joins_sources_or_mixes() -> None:
    batch_and_tokens = make_axis([(segment("text", 2),), (segment("video", 4),)])
    assert collapse(batch_and_tokens) == (segment("text+video", 8),)
    with_boundary = make_axis([(segment("batch", 2),), (segment("text", 8), segment("video", 32))])
    assert collapse(with_boundary) == (segment(f"batch+text+video+{MIXED}", 80),)
    assert collapse(UNKNOWN) is None


def test_collapse_lists_the_runs_of_every_shard() -> None:
    runs = (segment("text", 8), segment("video", 32))
    assert collapse(make_axis([(segment("", 3),), runs])) == runs * 3
    for count in (N, 200):
        (mixed,) = collapse(make_axis([(segment("", count),), runs])) or ()
        assert MIXED in mixed.sources and mixed.length == 40 * count


def test_resample_mixes_across_a_boundary_only() -> None:
    assert resample(single(VIDEO, 32), 16) == single(VIDEO, 16)
    assert resample(joint(("text", 8), ("video", 32)), 20) == single({"text", "video", MIXED}, 20)


def test_flip_tile_interleave() -> None:
    tokens = joint(("text", 2), ("video", 3))
    assert positions(flip(tokens)) == positions(tokens)[::-1]
    assert positions(tile(tokens, 2)) == positions(tokens) * 2
    assert positions(interleave(tokens, 2)) == [p for p in positions(tokens) for _ in range(2)]


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [(12, 4, 3), (12, 5, None), (12, 0, None), (64 * N * T, 16 * N, 4 * T), (N, T, None), (N * T + T, T, N + 1)],
)
def test_exact_quotient(a: sympy.Expr, b: sympy.Expr, quotient: sympy.Expr | None) -> None:
    assert exact_quotient(sympy.sympify(a), sympy.sympify(b)) == quotient
