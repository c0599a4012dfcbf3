"""The one place that touches private parts of diffusers: its closed list of attention backends gets another member."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["BackendUnsupported", "add_backend", "native_attention", "uses_dispatcher", "when_set"]

TESTED = "0.42"
_ATTRIBUTES = ("_backends", "_constraints", "_supported_arg_names")


class BackendUnsupported(RuntimeError):
    """This version of diffusers keeps its attention backends in another way, or has none."""


def add_backend(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Make ``function`` what ``model.set_attention_backend(name)`` chooses.

    Raises:
        BackendUnsupported: diffusers is missing, or its private parts are not as in the versions that were tried.
    """
    names, registry = _private_parts()
    member = names._value2member_map_.get(name)
    if member is None:
        # The list is an enum of strings, and closed: a member is added as the enum's own machinery would do it.
        member = str.__new__(names, name)
        member._name_, member._value_ = name.upper(), name
        type.__setattr__(names, name.upper(), member)
        names._member_map_[name.upper()] = member
        names._member_names_.append(name.upper())
        names._value2member_map_[name] = member
    registry.register(member, constraints=[])(function)


def _private_parts() -> tuple[Any, Any]:
    try:
        import diffusers
        from diffusers.models import attention_dispatch
    except ImportError as error:
        raise BackendUnsupported(
            f"attention backends need diffusers {TESTED}: {error}. pip install 'svg2-compile[diffusers]'"
        ) from error
    names = getattr(attention_dispatch, "AttentionBackendName", None)
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    missing = [attribute for attribute in _ATTRIBUTES if not isinstance(getattr(registry, attribute, None), dict)]
    if names is None or missing or not issubclass(names, str) or not hasattr(registry, "register"):
        what = ", ".join(missing) or "AttentionBackendName"
        raise BackendUnsupported(
            f"diffusers {diffusers.__version__} keeps its attention backends in a way that is not known here ({what}). "
            f"Tried: {TESTED}. svg2_compile.enable(pipe) needs none of this."
        )
    return names, registry


def uses_dispatcher(model: nn.Module) -> bool:
    """Whether the attentions of a model ask diffusers for the backend; some call PyTorch's attention directly."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return any(hasattr(type(processor), "_attention_backend") for processor in processors if processor is not None)


def when_set(told: Callable[[nn.Module, str], None]) -> None:
    """Call ``told`` with the model and the name after every ``set_attention_backend``."""
    from diffusers import ModelMixin

    plain = ModelMixin.set_attention_backend
    if hasattr(plain, "svg2_told"):
        return

    @functools.wraps(plain)
    def set_attention_backend(self: Any, backend: str) -> None:
        plain(self, backend)
        told(self, backend.lower())

    set_attention_backend.svg2_told = told  # type: ignore[attr-defined]
    ModelMixin.set_attention_backend = set_attention_backend


def native_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """PyTorch's attention in the layout of diffusers, [B, N, H, D]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
