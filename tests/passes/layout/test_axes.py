"""The token-layout domain, checked position by position against what the operations mean."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.passes.layout.axes import (
    MIXED,
    ONE,
    UNKNOWN,
    Axis,
    Segment,
    collapse,
    concat,
    constant,
    cut,
    exact_quotient,
    flip,
    interleave,
    make_axis,
    resample,
    single,
    tile,
)
from svg2_compile.passes.layout.reshape import reshape
from svg2_compile.passes.layout.union import union

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


def test_normal_form_merges_neighbours_and_drops_ones() -> None:
    assert make_axis([(segment("video", 1),), (segment("video", 4),), (segment("video", 3),)]) == single(VIDEO, 12)
    assert make_axis([(segment("video", 4), segment("video", 3), segment("text", 0))]) == single(VIDEO, 7)
    assert single(VIDEO, 1) == ONE
    assert constant(0).length == 0


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
    assert union(first, second) == joint(("video", 8), (f"text+{MIXED}", 16), ("audio", 4))


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
        assert got == wanted or (MIXED in got and wanted <= got) or (one_outer_position and got <= wanted)


def test_concat_keeps_boundaries() -> None:
    assert concat([single(TEXT, 8), single(VIDEO, 32)]) == joint(("text", 8), ("video", 32))
    assert concat([single(TEXT, 8), UNKNOWN]) == UNKNOWN


def test_collapse_of_a_product_joins_sources_or_mixes() -> None:
    batch_and_tokens = make_axis([(segment("text", 2),), (segment("video", 4),)])
    assert collapse(batch_and_tokens) == (segment("text+video", 8),)
    with_boundary = make_axis([(segment("batch", 2),), (segment("text", 8), segment("video", 32))])
    assert collapse(with_boundary) == (segment(f"batch+text+video+{MIXED}", 80),)
    assert collapse(UNKNOWN) is None


def test_resample_mixes_across_a_boundary_only() -> None:
    assert resample(single(VIDEO, 32), 16) == single(VIDEO, 16)
    assert resample(joint(("text", 8), ("video", 32)), 20) == single({"text", "video", MIXED}, 20)


def test_flip_tile_interleave() -> None:
    tokens = joint(("text", 2), ("video", 3))
    assert positions(flip(tokens)) == positions(tokens)[::-1]
    assert positions(tile(tokens, 2)) == positions(tokens) * 2
    assert positions(interleave(tokens, 2)) == [p for p in positions(tokens) for _ in range(2)]


def test_reshape_keeps_the_boundary_through_a_flattened_batch() -> None:
    sizes = [sympy.Integer(size) for size in (2, 40, 16)]
    tensor = (single({"text", "video"}, 2), joint(("text", 8), ("video", 32)), constant(16))
    flat = reshape(tensor, sizes, [sympy.Integer(80), sympy.Integer(16)])
    assert reshape(flat, [sympy.Integer(80), sympy.Integer(16)], sizes) == tensor


def test_reshape_with_symbolic_sizes() -> None:
    sizes = [sympy.Integer(2), 64 * N + T, sympy.Integer(24)]
    tensor = (single({"text", "video"}, 2), joint(("video", 64 * N), ("text", T)), constant(24))
    heads = reshape(tensor, sizes, [sympy.Integer(2), 64 * N + T, sympy.Integer(4), sympy.Integer(6)])
    assert heads == (tensor[0], tensor[1], constant(4), constant(6))


def test_reshape_loses_only_the_axes_that_do_not_fit() -> None:
    sizes = [sympy.Integer(size) for size in (5, 6, 4)]
    tensor = (single(TEXT, 5), joint(("text", 2), ("video", 4)), single(VIDEO, 4))
    result = reshape(tensor, sizes, [sympy.Integer(size) for size in (3, 10, 4)])
    assert result == (UNKNOWN, UNKNOWN, single(VIDEO, 4))


@given(st.lists(axes, min_size=1, max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_reshape_moves_no_element(tensor: list[Axis], data: st.DataObject) -> None:
    sizes = [axis.length or sympy.Integer(1) for axis in tensor]
    rest = int(math.prod(int(size) for size in sizes))
    new_sizes: list[sympy.Expr] = []
    while rest > 1 and len(new_sizes) < 4:
        size = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        new_sizes.append(sympy.Integer(size))
        rest //= size
    new_sizes.append(sympy.Integer(rest))
    result = reshape(tuple(tensor), sizes, new_sizes)
    before = [frozenset().union(*c) for c in itertools.product(*map(positions, tensor))]
    lost = any(not axis.known for axis in result)
    claims = [positions(a) if a.known else [frozenset[str]()] * int(s) for a, s in zip(result, new_sizes, strict=True)]
    for got, wanted in zip(itertools.product(*claims), before, strict=True):
        certain = frozenset().union(*(sources for sources in got if MIXED not in sources))
        assert certain <= wanted
        assert lost or wanted <= frozenset().union(*got)
        assert lost or MIXED in frozenset().union(*got) or certain == wanted


def test_reshape_of_nothing_claims_nothing() -> None:
    zero = sympy.Integer(0)
    assert reshape((constant(0), constant(4)), [zero, sympy.Integer(4)], [sympy.Integer(2), zero]) == (UNKNOWN, UNKNOWN)


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [(12, 4, 3), (12, 5, None), (12, 0, None), (64 * N * T, 16 * N, 4 * T), (N, T, None), (N * T + T, T, N + 1)],
)
def test_exact_quotient(a: sympy.Expr, b: sympy.Expr, quotient: sympy.Expr | None) -> None:
    assert exact_quotient(sympy.sympify(a), sympy.sympify(b)) == quotient
