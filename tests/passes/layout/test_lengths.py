"""Symbolic lengths mean what their numbers mean: whatever is concluded holds for every size of the inputs."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import CleanDiv, FloorDiv, IntTrueDiv, Max, Mod, PythonMod

from svg2_compile.passes.layout.lengths import Undecided, exact_quotient, known_number, longer, same_length, shorter
from tests.passes.layout.made_axes import N, T

H = sympy.Symbol("s7", integer=True)  # an int that the model was called with: Dynamo does not say that it is positive
SIZES = st.fixed_dictionaries({symbol: st.integers(2, 40) for symbol in (N, T, H)})


def _combined(parts: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    number = st.integers(1, 4).map(sympy.Integer)
    return st.one_of(
        st.tuples(parts, parts).map(lambda pair: pair[0] + pair[1]),
        st.tuples(parts, parts).map(lambda pair: pair[0] - pair[1]),
        st.tuples(parts, parts).map(lambda pair: pair[0] * pair[1]),
        st.tuples(parts, number).map(lambda pair: FloorDiv(pair[0], pair[1])),
        st.tuples(parts, number).map(lambda pair: PythonMod(pair[0], pair[1])),
        st.tuples(parts, parts).map(lambda pair: Max(*pair)),
    )


LENGTHS = st.recursive(
    st.one_of(st.sampled_from([N, T, H]), st.integers(1, 8).map(sympy.Integer)), _combined, max_leaves=6
)


@given(LENGTHS, LENGTHS, SIZES)
@settings(max_examples=200, deadline=None)
def test_what_is_concluded_holds_for_every_size(a: sympy.Expr, b: sympy.Expr, sizes: dict[sympy.Symbol, int]) -> None:
    number_a, number_b = known_number(a, sizes), known_number(b, sizes)
    assert number_a is not None and number_b is not None
    if same_length(a, b):
        assert number_a == number_b
    quotient = exact_quotient(a, b)
    if quotient is not None and number_b != 0:
        assert known_number(quotient, sizes) == number_a / number_b
    try:
        assert known_number(longer(a, b), sizes) == max(number_a, number_b)
        assert known_number(shorter(a, b), sizes) == min(number_a, number_b)
    except Undecided:
        assert a.free_symbols | b.free_symbols


@pytest.mark.parametrize(
    ("smaller", "greater"),
    [
        (0, N * FloorDiv(T, 2) * FloorDiv(H, 2)),
        (N, N + PythonMod(2 - Mod(H, 2), 2)),
        (N, N - FloorDiv(-H, 2)),  # ceil(H / 2)
        (N, N + Max(0, H - T)),
    ],
)
def test_sizes_are_not_negative(smaller: sympy.Expr, greater: sympy.Expr) -> None:
    smaller = sympy.sympify(smaller)
    assert longer(smaller, greater) == longer(greater, smaller) == greater
    assert shorter(smaller, greater) == smaller


def test_a_difference_of_sizes_may_have_any_sign() -> None:
    for other in (T, FloorDiv(N * T, 8), H - 1):
        with pytest.raises(Undecided):
            longer(N, sympy.sympify(other))


def test_an_exact_division_is_a_fraction() -> None:
    rows = CleanDiv(N, H * T)
    assert same_length(rows * H * T, N)
    assert exact_quotient(N, rows) == H * T
    assert exact_quotient(4 * rows, rows) == 4
    assert exact_quotient(16 * rows, sympy.Integer(4)) == 4 * rows
    assert not same_length(FloorDiv(N, H * T) * H * T, N)
    assert exact_quotient(N + PythonMod(N, 2), sympy.Integer(2)) is None  # integer, but not by its form


@pytest.mark.parametrize(
    ("length", "number"),
    [
        (7, 7),
        (sympy.Float(576.0), 576),
        (IntTrueDiv(N, 4), None),
        (FloorDiv(IntTrueDiv(N, 4), 32), None),
        (FloorDiv(N, T - 3), None),
        (N + sympy.Symbol("u0"), None),
    ],
)
def test_a_number_is_an_integer_or_none(length: sympy.Expr | int, number: int | None) -> None:
    assert known_number(length, {N: 2475, T: 3}) == number
