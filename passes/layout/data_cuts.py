"""Cuts whose place depends on data, and whose length follows from that place all the same.

    joint [1, 480 + u0, 64],  joint[:, :-u0]   ->   [1, 480, 64]      PyTorch says [1, u7, 64]
                              joint[:, -u0:]   ->   [1, u0, 64]

A cut that is counted from the end by a number of tokens is taken to be counted so by at least one: with none, such code
takes the whole for the part, and fails by itself where it puts the parts back.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from svg2_compile.passes.layout.lengths import counts_from_end, is_not_negative, size_expr

__all__ = ["of_known_length"]


def of_known_length(
    tensor: torch.Tensor,
    cut: torch.Tensor,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> torch.Tensor:
    """The result of `aten.slice` with the length that its arguments say, if PyTorch made a new symbol of it."""
    length = cut.shape[dim]
    if step != 1 or not isinstance(length, torch.SymInt) or not free_unbacked_symbols(length):
        return cut
    size = tensor.shape[dim]
    begin = 0 if start is None else _from_front(start, size)
    stop = size if end is None or (isinstance(end, int) and end >= sys.maxsize) else _from_front(end, size)
    places = [sympy.Integer(0), *map(_expanded, (begin, stop, size))]
    if not all(is_not_negative(after - before) for before, after in itertools.pairwise(places)):
        return cut
    shape, stride = list(tensor.shape), tensor.stride()
    shape[dim] = _plain(stop - begin)
    return tensor.as_strided(shape, stride, tensor.storage_offset() + _plain(begin) * stride[dim])


def _from_front(place: Any, size: Any) -> Any:
    return place + size if counts_from_end(size_expr(place)) else place


def _expanded(size: Any) -> sympy.Expr:
    return sympy.expand(size_expr(size))


def _plain(size: Any) -> Any:
    expr = _expanded(size)
    return int(expr) if expr.is_Integer else size
