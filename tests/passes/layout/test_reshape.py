"""Axes through a change of shape: no element moves."""

from __future__ import annotations

import itertools
import math

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.passes.layout.axes import MIXED, UNKNOWN, Axis, constant, single
from svg2_compile.passes.layout.reshape import reshape
from tests.passes.layout.made_axes import TEXT, VIDEO, N, T, axes, is_padded, joint, positions


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
    padded = any(map(is_padded, tensor))
    lost = any(not axis.known for axis in result)
    claims = [positions(a) if a.known else [frozenset[str]()] * int(s) for a, s in zip(result, new_sizes, strict=True)]
    for got, wanted in zip(itertools.product(*claims), before, strict=True):
        certain = frozenset().union(*(sources for sources in got if MIXED not in sources))
        assert certain <= wanted or padded
        assert lost or wanted <= frozenset().union(*got)
        assert lost or MIXED in frozenset().union(*got) or certain == wanted or padded


def test_reshape_of_nothing_claims_nothing() -> None:
    zero = sympy.Integer(0)
    assert reshape((constant(0), constant(4)), [zero, sympy.Integer(4)], [sympy.Integer(2), zero]) == (UNKNOWN, UNKNOWN)
