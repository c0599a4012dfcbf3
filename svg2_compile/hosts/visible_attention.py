"""Attention that Dynamo sees where it gave up on the function around it.

A function that Dynamo cannot trace runs eagerly, but it still looks at every Python function that is called from there.
PyTorch's attention is none, it is built in. With a Python function in its place, the attention alone is a graph, in
which it is judged like any other behind a graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["as_python_function"]


def as_python_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """``scaled_dot_product_attention`` as a frame of its own."""

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return scaled_dot_product_attention
