"""Attention that Dynamo sees where it gave up on the function around it, or may not look into it.

A function that Dynamo cannot trace runs eagerly, but it still looks at every Python function that is called from there.
PyTorch's attention is none, it is built in. With a Python function in its place, the attention alone is a graph, in
which it is judged like any other behind a graph break.

Under torch.compiler.disable (MagCache and other hooks of diffusers) Dynamo does not look at all: there the attention
itself is called through the compiler, as :data:`attend_alone` says.

Modes of torch functions (diffusers' perturbed attention) tell attention by its identity: it is
``torch.nn.functional.scaled_dot_product_attention`` as it is now, and so they are shown the function in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import handle_torch_function
from torch.utils._device import DeviceContext

__all__ = ["as_python_function", "attend_alone"]

# What attention goes through where Dynamo is off, inside of an enabled call; None outside of one.
attend_alone: ContextVar[Callable[..., Any] | None] = ContextVar("svg2_attend_alone", default=None)


def as_python_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """``scaled_dot_product_attention`` as a frame of its own."""

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        if _is_watched():
            return _shown_to_modes(scaled_dot_product_attention, args, kwargs)
        if not torch.compiler.is_dynamo_compiling():
            alone = attend_alone.get()
            if alone is not None:
                return _without_return(alone, args, kwargs)
        return original(*args, **kwargs)

    return scaled_dot_product_attention


def _without_return(alone: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls ``alone``, inside of which attention is only itself."""
    token = attend_alone.set(None)
    try:
        return alone(*args, **kwargs)
    finally:
        attend_alone.reset(token)


def _is_watched() -> bool:
    """Whether a mode is active that may look at attention. A default device does not."""
    number = torch._C._len_torch_function_stack()
    return any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(number))


@torch.compiler.disable
def _shown_to_modes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Dynamo would show them the built-in function.
    return handle_torch_function(function, args, *args, **kwargs)
