"""Lengths of axes: integers, or sympy expressions over the sizes of a graph's inputs, compared without a guard.

Sizes are integers and not negative by construction, which sympy cannot see: F * (H // 2) * (W // 2) may have any sign
for all that it knows. So a comparison looks at the polynomial of an expression: what is no sum or product (a floor
division, a remainder, a maximum) becomes a symbol of its own, with the sign that it must have.

    F * (H // 2) * (W // 2) - 0              ->  F * a * b, not negative
    (H // 2) * 2  where 2 divides H          ->  H

Nothing is ever guarded on: two lengths are equal only where that can be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

__all__ = [
    "Undecided",
    "counts_from_end",
    "exact_quotient",
    "is_not_negative",
    "known_number",
    "longer",
    "same_length",
    "shorter",
    "size_expr",
]


class Undecided(Exception):
    """Two symbolic lengths cannot be compared without a guard."""


def size_expr(size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    """A tensor size as a sympy expression, with floor divisions that leave no remainder marked as exact."""
    if not isinstance(size, torch.SymInt):
        return size if isinstance(size, sympy.Expr) else sympy.Integer(size)
    expr = size.node.expr
    if not expr.has(FloorDiv):
        return expr
    shape_env = getattr(size.node, "shape_env", None)
    return _divided(expr, frozenset(getattr(shape_env, "divisible", ())))


@lru_cache(maxsize=4096)
def _divided(expr: sympy.Expr, without_remainder: frozenset[sympy.Expr]) -> sympy.Expr:
    def divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        quotient = exact_quotient(a, b)
        if quotient is not None:
            return quotient
        return CleanDiv(a, b) if Mod(a, b) in without_remainder else FloorDiv(a, b)

    return expr.replace(lambda part: type(part) is FloorDiv, lambda part: divide(*part.args))


def same_length(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two lengths are equal for every value of their symbols (False also where that cannot be shown)."""
    if a == b:
        return True
    if a.is_number and b.is_number:
        return False
    return bool(_difference(a, b) == 0)


@lru_cache(maxsize=4096)
def exact_quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """`a / b` where b is known to divide a, else None."""
    if a.is_Integer and b.is_Integer:
        return a // b if b != 0 and a % b == 0 else None
    if b == 0:
        return None
    for carry_out in (False, True):
        quotient = sympy.together(sympy.cancel(_polynomial(a, carry_out) / _polynomial(b, carry_out)))
        if sympy.fraction(quotient)[1] == 1:
            return _original(sympy.expand(quotient), _opaque_parts(a, carry_out) | _opaque_parts(b, carry_out))
    return None


def longer(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The greater of two lengths. Raises `Undecided` where symbols leave it open."""
    return a if _is_at_least(a, b) else b


def shorter(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The smaller of two lengths. Raises `Undecided` where symbols leave it open."""
    return b if _is_at_least(a, b) else a


def is_not_negative(length: sympy.Expr) -> bool:
    """Whether a length is at least zero, as far as that can be shown."""
    return bool(_polynomial(length).is_nonnegative)


def counts_from_end(place: sympy.Expr) -> bool:
    """Whether a place in a slice is negative: a number of tokens, with a minus sign."""
    place = _polynomial(place)
    return bool(place.is_negative or (place.is_nonpositive and place.free_symbols))


def known_number(length: Any, known: Mapping[sympy.Symbol, Any]) -> int | None:
    """The number that a length is for the sizes `known`; None where a symbol is left, or where it is no integer."""
    if isinstance(length, int):
        return length
    try:
        value = sympy.sympify(length).xreplace({symbol: sympy.sympify(size) for symbol, size in known.items()})
        return int(value) if value.is_number and int(value) == float(value) else None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, AssertionError):
        return None  # what sympy makes of a division inside a division


def _is_at_least(a: sympy.Expr, b: sympy.Expr) -> bool:
    difference = _difference(a, b)
    if difference.is_nonnegative:
        return True
    if difference.is_nonpositive:
        return False
    raise Undecided


@lru_cache(maxsize=4096)
def _difference(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    difference = sympy.expand(_polynomial(a) - _polynomial(b))
    return difference if difference.is_polynomial() else sympy.expand(sympy.cancel(difference))


@lru_cache(maxsize=4096)
def _polynomial(expr: sympy.Expr, carry_out: bool = True) -> sympy.Expr:
    """The expression as a polynomial over symbols of known sign; with exact divisions carried out as fractions."""
    if expr.is_Rational:
        return expr
    if expr.is_Add or expr.is_Mul:
        return expr.func(*(_polynomial(part, carry_out) for part in expr.args))
    if expr.is_Pow and expr.exp.is_Integer:
        return _polynomial(expr.base, carry_out) ** expr.exp
    if carry_out and isinstance(expr, CleanDiv):
        return _polynomial(expr.args[0]) / _polynomial(expr.args[1])
    return _opaque(expr)


def _opaque(expr: sympy.Expr) -> sympy.Symbol:
    if expr.is_Symbol:
        return sympy.Symbol(expr.name, integer=True, positive=True) if expr.is_positive else _nonnegative(expr.name)
    sign = _sign(expr)
    if sign is None:
        return sympy.Symbol(f"<{expr}>", integer=True)
    return _nonnegative(f"<{expr}>") if sign else sympy.Symbol(f"<{expr}>", integer=True, nonpositive=True)


def _nonnegative(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _sign(expr: sympy.Expr) -> bool | None:
    """Whether an expression that is no polynomial is at least zero (True), at most zero (False) or neither for sure."""
    if isinstance(expr, (Mod, PythonMod, sympy.Mod)):
        return True if _polynomial(expr.args[1]).is_positive else None
    signs = [True if p.is_nonnegative else False if p.is_nonpositive else None for p in map(_polynomial, expr.args)]
    if isinstance(expr, Max):
        return True if True in signs else None
    if isinstance(expr, Min):
        return True if all(sign is True for sign in signs) else None
    if isinstance(expr, FloorDiv):
        return signs[0] if signs[1] is True else None
    return True if all(sign is True for sign in signs) else None


def _opaque_parts(expr: sympy.Expr, carry_out: bool) -> frozenset[sympy.Expr]:
    """The symbols and parts of an expression that stand as symbols in its polynomial."""
    is_power = expr.is_Pow and expr.exp.is_Integer
    if expr.is_Add or expr.is_Mul or is_power or (carry_out and isinstance(expr, CleanDiv)):
        return frozenset().union(*(_opaque_parts(part, carry_out) for part in expr.args))
    return frozenset() if expr.is_number else frozenset({expr})


def _original(polynomial: sympy.Expr, parts: frozenset[sympy.Expr]) -> sympy.Expr:
    return polynomial.xreplace({_opaque(part): part for part in parts})
