"""The part of ComfyUI that the nodes touch, from the facts of its interface: wrappers, patchers, torch.compile."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

APPLY_MODEL = "apply_model"


class Executor:
    """Calls wrappers from the outside in, then the method of ``class_obj``."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class BaseModel(torch.nn.Module):
    """Holds the diffusion model; wrappers arrive in transformer_options."""

    def __init__(self, diffusion_model: torch.nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def apply_model(self, x: Any, t: Any, transformer_options: dict[str, Any]) -> Any:
        wrappers = transformer_options.get("wrappers", {}).get(APPLY_MODEL, {})
        chain = [wrapper for group in wrappers.values() for wrapper in group]
        return Executor(self._apply_model, self, chain)(x, t, None, None, None, transformer_options)

    def _apply_model(self, x: Any, t: Any, *rest: Any) -> Any:
        return self.diffusion_model(x, t, transformer_options=rest[3])


class ModelPatcher:
    """What nodes call a MODEL: a model with options, cloned by every node that changes it."""

    def __init__(self, model: BaseModel, model_options: dict[str, Any] | None = None) -> None:
        self.model = model
        self.model_options = model_options or {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        options = dict(self.model_options)
        inner = dict(options["transformer_options"])
        inner["wrappers"] = {kind: dict(groups) for kind, groups in inner.get("wrappers", {}).items()}
        return ModelPatcher(self.model, {**options, "transformer_options": inner})

    def get_model_object(self, key: str) -> Any:
        return self.model.get_submodule(key)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.model_options["transformer_options"].get("wrappers", {}).get(kind, {}).pop(key, None)


def set_torch_compile_wrapper(
    model: ModelPatcher,
    backend: str,
    options: Any = None,
    keys: list[str] = ["diffusion_model"],  # noqa: B006
) -> None:
    """Modules at ``keys`` are exchanged for compiled ones for as long as a call of apply_model lasts."""
    compiled = {key: torch.compile(model.get_model_object(key), backend=backend, options=options) for key in keys}

    def wrapper(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        plain = {key: executor.class_obj.get_submodule(key) for key in compiled}
        try:
            for key, module in compiled.items():
                _set(executor.class_obj, key, module)
            return executor(*args, **kwargs)
        finally:
            for key, module in plain.items():
                _set(executor.class_obj, key, module)

    model.remove_wrappers_with_key(APPLY_MODEL, "torch.compile")
    model.add_wrapper_with_key(APPLY_MODEL, "torch.compile", wrapper)


def _set(owner: torch.nn.Module, key: str, value: Any) -> None:
    *path, name = key.split(".")
    setattr(owner.get_submodule(".".join(path)), name, value)


def attention_sub_quad(q: Any, k: Any, v: Any, heads: int, transformer_options: Any = None) -> Any:
    """In two chunks of queries, as ComfyUI computes attention on a CPU, unless it is overridden."""
    override = (transformer_options or {}).get("optimized_attention_override")
    if override is not None:
        return override(attention_sub_quad, q, k, v, heads)
    return torch.cat([attention_pytorch(chunk, k, v, heads) for chunk in q.chunk(2, dim=1)], dim=1)


def attention_pytorch(q: Any, k: Any, v: Any, heads: int, **more: Any) -> Any:
    """[B, N, H * D] in and out."""
    split = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import comfy`` find this."""
    modules: dict[str, dict[str, Any]] = {
        "comfy.patcher_extension": {"WrappersMP": types.SimpleNamespace(APPLY_MODEL=APPLY_MODEL)},
        "comfy.ldm.modules.attention": {
            "optimized_attention": attention_sub_quad,
            "attention_pytorch": attention_pytorch,
        },
        "comfy_api.torch_helpers": {"set_torch_compile_wrapper": set_torch_compile_wrapper},
    }
    for name, content in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if not isinstance(sys.modules.get(path), types.ModuleType):
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[path])
        vars(sys.modules[name]).update(content)
