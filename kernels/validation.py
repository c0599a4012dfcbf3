"""How a call of an op is checked: the rules that contracts are made of, and the errors they raise.

A contract (``contracts.py``) is a tuple of rules that are applied in order. ``tensor("k_offsets", INT32, "[B, Hkv,
Ck + 3]")`` reads: this argument is int32, and its sizes are those that the letters stand for. A letter gets its size
from the first tensor that mentions it, and every later one must agree. An argument that is None is left out: which
ones may be None is said by the op's signature.

Every check reads metadata only (never tensor contents), so it costs microseconds and never synchronises with a
device. A wrong dtype is a ``TypeError``; a wrong shape, device or range is a ``ValueError``. A message says what was
given and what is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of an op on its way through a contract."""

    op: str
    arguments: Mapping[str, Any]  # by name, with the defaults
    sizes: dict[str, int]  # what each letter stands for, as far as the rules have come


Rule = Callable[[Call], None]
Contract = tuple[Rule, ...]


class Dim(NamedTuple):
    """One dimension of a shape: "Ck + 3" is letter Ck and extra 3; "1 or H" is letter H and or_one."""

    letter: str
    extra: int
    or_one: bool


@dataclass(frozen=True)
class TensorRule:
    """dtype and shape of one tensor; made by ``tensor``."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[Dim, ...]
    meaning: str
    like: str | None

    def __call__(self, call: Call) -> None:
        """Raise TypeError or ValueError unless the tensor has its dtype and shape; binds the shape's new letters."""
        tensor = call.arguments[self.name]
        if tensor is None:
            return
        require_dtype(call.op, self.name, tensor, self.dtypes)
        if self.like is not None:
            require_dtype(call.op, self.name, tensor, (call.arguments[self.like].dtype,))
        known = call.sizes.copy()
        if not _bind(tensor.shape, self.dims, call.sizes):
            valid = f"{self.meaning} = [{', '.join(_valid_sizes(tensor.shape, self.dims, known))}]"
            raise ValueError(f"svg2::{call.op}: {self.name} has shape {list(tensor.shape)}; valid: {valid}")


def tensor(
    name: str, dtypes: tuple[torch.dtype, ...], shape: str, *, meaning: str | None = None, like: str | None = None
) -> TensorRule:
    """Argument ``name`` has one of ``dtypes`` and a shape such as "[B, Hq, Cq + 2]" or, if H is known, "[B, 1 or H]".

    meaning: what an error calls the shape, where that is not the shape itself. like: another argument, whose dtype
    this one must have.
    """
    terms = shape.strip("[]").split(", ") if shape != "[]" else []
    return TensorRule(name, dtypes, tuple(_dim(term) for term in terms), meaning or shape, like)


def _dim(term: str) -> Dim:
    letter, _, extra = term.removeprefix("1 or ").partition(" + ")
    return Dim(letter, int(extra or 0), term.startswith("1 or "))


def _bind(shape: Sequence[int], dims: Sequence[Dim], sizes: dict[str, int]) -> bool:
    """Whether ``shape`` agrees with the known sizes; letters without one get theirs."""
    if len(shape) != len(dims):
        return False
    for size, (letter, extra, or_one) in zip(shape, dims, strict=True):
        known = sizes.setdefault(letter, size - extra)
        if known + extra != size and not (or_one and size == 1):
            return False
    return True


def _valid_sizes(shape: Sequence[int], dims: Sequence[Dim], sizes: Mapping[str, int]) -> list[str]:
    """What ``shape`` should have been, given the sizes that were known before; "*" where anything goes."""
    texts = []
    for index, (letter, extra, or_one) in enumerate(dims):
        if or_one and len(shape) == len(dims) and shape[index] == 1:
            texts.append("1")
        else:
            texts.append(str(sizes[letter] + extra) if letter in sizes else "*")
    return texts


def dimension(letter: str, name: str) -> Rule:
    """From here on ``letter`` stands for the integer argument ``name``."""

    def rule(call: Call) -> None:
        call.sizes[letter] = call.arguments[name]

    return rule


def at_least_one(name: str, unit: str = "") -> Rule:
    """The integer ``name`` is positive."""

    def rule(call: Call) -> None:
        value = call.arguments[name]
        if value < 1:
            raise ValueError(f"svg2::{call.op}: {name} is {value}; valid: an integer of at least 1{unit}")

    return rule


def in_range(name: str, low: float, high: float) -> Rule:
    """The number ``name`` lies in [low, high] (NaN never does)."""

    def rule(call: Call) -> None:
        value = call.arguments[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"svg2::{call.op}: {name} is {value}; valid: a number in [{low}, {high}]")

    return rule


def finite_scale(call: Call) -> None:
    """The softmax scale is finite."""
    scale = call.arguments["scale"]
    if not math.isfinite(scale):
        raise ValueError(f"svg2::{call.op}: scale is {scale}; valid: a finite number, usually head_dim ** -0.5")


def validate(op: str, contract: Contract, arguments: Mapping[str, Any]) -> torch.device:
    """Apply ``contract`` to ``arguments``, all of them by name; returns the device that their tensors are on.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or range and for tensors on several devices.
    """
    call = Call(op, arguments, {})
    for rule in contract:
        rule(call)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    require_same_device(op, **tensors)
    return next(iter(tensors.values())).device


def require_dtype(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless ``tensor.dtype`` is one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        given, *valid = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise TypeError(f"svg2::{op}: {name} has dtype {given}; valid: {', '.join(valid)}")


def require_same_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        listing = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"svg2::{op}: all tensors must be on one device; given: {listing}")
