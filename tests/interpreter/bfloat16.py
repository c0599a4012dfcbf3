"""Makes Triton's interpreter compute with bfloat16.

The interpreter keeps a bfloat16 tile as the uint16 bit patterns that NumPy can hold, and most of its operations then
act on the patterns: dot products, sums, comparisons and maxima of bfloat16 are wrong without a word. Here such tiles
are widened to float32 before an operation and rounded to nearest even after it, as the hardware does. Checked with
Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["install", "narrow", "widen"]


def widen(patterns: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32, exact."""
    return (np.asarray(patterns).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    # A comparison's result is no number to round.
    data = handle.data if handle.data.dtype == np.bool_ else narrow(handle.data)
    return TensorHandle(data, tl.bfloat16)


def _elementwise(original: Callable[..., TensorHandle], operands: int) -> Callable[..., TensorHandle]:
    def operation(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        if not any(_is_bfloat16(handle) for handle in args[:operands]):
            return original(self, *args)
        widened = [_widened(handle) for handle in args[:operands]]
        return _narrowed(original(self, *widened, *args[operands:]))

    return operation


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        to_bfloat16 = target.scalar == tl.bfloat16
        if _is_bfloat16(source) and not to_bfloat16:
            return original(self, _widened(source), target)
        if to_bfloat16 and not _is_bfloat16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, target)

    return cast


def _integer_bounds(original: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 with NumPy 2.4: a tile of one element must still work as a bound of ``range``."""

    def patch_tensor(tensor: type, *scope: Any) -> None:
        original(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).squeeze())

        if scope and hasattr(scope[0], "set_attr"):
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index  # type: ignore[attr-defined]

    return patch_tensor


_installed = False


def install() -> None:
    """Correct the interpreter of this process, once."""
    global _installed
    if _installed:
        return
    _installed = True
    builder = InterpreterBuilder
    original_dot, original_round = builder.create_dot, builder.create_fp_to_fp
    builder.binary_op = _elementwise(builder.binary_op, 2)
    builder.unary_op = _elementwise(builder.unary_op, 1)
    builder.cast_impl = _cast(builder.cast_impl)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original_dot(self, _widened(a), _widened(b), *rest)

    def round_to(self: InterpreterBuilder, source: TensorHandle, target: Any, mode: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return original_round(self, source, target, mode)

    builder.create_dot = dot
    builder.create_fp_to_fp = round_to
    builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)
    interpreter._patch_lang_tensor = _integer_bounds(interpreter._patch_lang_tensor)
