"""Implementations of the ``svg2::`` operators that only a benchmark has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from svg2_compile.kernels.dispatch import IMPLEMENTATIONS, Implementation, use_implementation

__all__ = ["implementation"]


@contextmanager
def implementation(name: str, module: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block by the functions of ``module``, on CPU tensors."""
    before = IMPLEMENTATIONS.get(name)
    IMPLEMENTATIONS[name] = Implementation(module, ("cpu",))
    try:
        with use_implementation(name):
            yield
    finally:
        if before is None:
            del IMPLEMENTATIONS[name]
