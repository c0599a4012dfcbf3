"""Attentions that a model asks of PyTorch directly, without diffusers' dispatcher (CogVideoX, Mochi, Allegro)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["DirectAttention"]

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class DirectAttention(TorchFunctionMode):
    """While inside, ``scaled_dot_product_attention`` is ``attention``, which takes and gives [B, N, H, D]."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        call = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        query, key, value = (call.pop(name) for name in _NAMES[:3])
        if any(tensor.dim() != 4 for tensor in (query, key, value)):
            return func(*args, **kwargs)
        return self._attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **call).transpose(1, 2)
