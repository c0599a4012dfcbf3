"""Functions under torch.compiler.disable, traced all the same.

Model code puts the decorator on pure tensor functions too (a rotary embedding, the attention itself), where an older
compiler had trouble. torch.export looks through it; so does an enabled model. Whether that changes a result is found
out by the first call (compiled_call.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["looking_through"]


def looking_through(method: Callable[..., Any], names: dict[str, None]) -> Callable[..., Any]:
    """Dynamo's call of a skipped function, tracing what was disabled by a decorator. ``names`` learns which."""

    @functools.wraps(method)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        original = _original(self.value)
        if original is None:
            return method(self, tx, args, kwargs)
        from torch._dynamo.source import AttrSource
        from torch._dynamo.variables.base import VariableTracker

        names[f"{original.__module__}.{original.__qualname__}"] = None
        source = None if self.source is None else AttrSource(self.source, "_torchdynamo_orig_callable")
        return VariableTracker.build(tx, original, source).call_function(tx, args, kwargs)

    return call_function


def _original(value: Any) -> Any:
    """The Python function that ``torch.compiler.disable`` wrapped; None for anything else, and for torch's own."""
    if not inspect.getattr_static(value, "_torchdynamo_disable", False):
        return None
    original = getattr(value, "_torchdynamo_orig_callable", None)
    if not inspect.isfunction(original) or original.__module__.partition(".")[0] in ("torch", "svg2_compile"):
        return None
    return original
