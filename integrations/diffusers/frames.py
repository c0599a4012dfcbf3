"""Who calls: a backend of diffusers is handed tensors alone, so the modules that call it are found on the stack."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Caller", "caller_of_attention"]

_CALL: CodeType = nn.Module._wrapped_call_impl.__code__


class Caller(NamedTuple):
    """The call of the model in which an attention is computed.

    module: the innermost that is being called. model: the outermost. args, kwargs: of the call of ``model``.
    """

    module: nn.Module
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def caller_of_attention() -> Caller | None:
    """The modules around the attention that is being computed in this thread; None if no module is called."""
    frame: FrameType | None = sys._getframe(1)
    innermost: nn.Module | None = None
    outermost: FrameType | None = None
    while frame is not None:
        if frame.f_code is _CALL:
            outermost = frame
            if innermost is None:
                innermost = frame.f_locals["self"]
        frame = frame.f_back
    if innermost is None or outermost is None:
        return None
    found = outermost.f_locals
    return Caller(innermost, found["self"], found["args"], found["kwargs"])
