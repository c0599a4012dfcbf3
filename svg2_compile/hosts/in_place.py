"""Enabled: a target whose modules are called through the compiler until it is disabled."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from svg2_compile.backend import Svg2Backend
from svg2_compile.hosts.calls import replace_call
from svg2_compile.hosts.compiled_call import CompiledCall, OwnCode
from svg2_compile.hosts.context_parallel import not_traced, prepare_hooks
from svg2_compile.hosts.diffusers import name_branches
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.model_call import ModelCall, Part, running_model, running_part
from svg2_compile.runtime.session import Session, report_of
from svg2_compile.runtime.time_reader import named_timesteps

__all__ = ["Enabled", "compile_in_place", "compile_parts", "enabled_of", "is_enabled", "register", "run_as_model"]

_enabled: weakref.WeakKeyDictionary[Any, Enabled] = weakref.WeakKeyDictionary()


class Enabled:
    """A pipeline or module that runs sparse. Also a context manager that disables at its end.

    Attributes:
        session: clock, centroids, history and compiled programs.
        modules: the models that run through the compiler.
        code: what their calls are compiled as.
    """

    def __init__(self, target: Any, session: Session) -> None:
        self.session = session
        self.code = OwnCode()
        # Weak, like all that is kept of the target here: the registry of enabled targets must not keep them alive.
        self._modules: list[weakref.ref[nn.Module]] = []
        self._undo: list[Callable[[], None]] = []
        self._target = weakref.ref(target)

    @property
    def modules(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]

    def report(self) -> Report:
        return report_of([self.session])

    def reset(self) -> None:
        self.session.reset()

    def disable(self) -> None:
        """Put back exactly what was there, and let go of all centroids."""
        while self._undo:
            self._undo.pop()()
        self.session.reset()
        target = self._target()
        if target is not None:
            _enabled.pop(target, None)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def register(target: Any, enabled: Enabled) -> None:
    """Remember what was enabled for ``target``, for as long as that lives."""
    _enabled[target] = enabled


def enabled_of(target: Any) -> Enabled | None:
    """What is enabled for ``target``; None if nothing is."""
    try:
        return _enabled.get(target)
    except TypeError:  # nothing that can be weakly referenced or hashed was ever enabled
        return None


def is_enabled(module: nn.Module) -> bool:
    """Whether calls of ``module`` are those of something enabled: of itself, or of a pipeline that it is part of."""
    return any(found is module for enabled in list(_enabled.values()) for found in enabled.modules)


def compile_in_place(
    module: nn.Module, label: str, backend: Svg2Backend, enabled: Enabled, *, fullgraph: bool, dynamic: bool | None
) -> None:
    """Let calls of ``module``, a whole model, run compiled."""
    if _stays_as_it_is(module, label, enabled):
        return
    run_as_model(module, label, enabled, _compiled(module, backend, enabled, fullgraph, dynamic))


def _stays_as_it_is(module: nn.Module, label: str, enabled: Enabled) -> bool:
    """Whether ``module`` cannot be compiled. Then that is said, and its calls are followed all the same."""
    why = not_traced(module)
    if why is not None:
        enabled.session.watch.leave(module, why)
        run_as_model(module, label, enabled, module._call_impl)
    return why is not None


def compile_parts(
    module: nn.Module,
    label: str,
    parts: Mapping[str, nn.Module],
    backend: Svg2Backend,
    enabled: Enabled,
    *,
    fullgraph: bool,
    dynamic: bool | None,
) -> None:
    """Let calls of the ``parts`` of ``module``, by their paths in it, run compiled, one graph for all of a kind."""
    if _stays_as_it_is(module, label, enabled):
        return
    for path, part in parts.items():
        _compile_part(part, ".".join(filter(None, (label, path))), backend, enabled, fullgraph, dynamic)
    # The model itself runs as it is; but its calls are told apart, and its arguments tell the timestep.
    if module not in parts.values():
        run_as_model(module, label, enabled, module._call_impl)


def _compile_part(
    part: nn.Module, label: str, backend: Svg2Backend, enabled: Enabled, fullgraph: bool, dynamic: bool | None
) -> None:
    compiled = _compiled(part, backend, enabled, fullgraph, dynamic)
    marker = Part(enabled.session, part, label)

    def call(*args: Any, **kwargs: Any) -> Any:
        with running_part(marker):
            return compiled(*args, **kwargs)

    _replace_call(part, call, enabled)


def _compiled(
    module: nn.Module, backend: Svg2Backend, enabled: Enabled, fullgraph: bool, dynamic: bool | None
) -> CompiledCall:
    session = enabled.session
    prepare_hooks(module)
    return CompiledCall(
        *(module, backend, session.once, enabled.code),
        fullgraph=fullgraph,
        dynamic=dynamic,
        read_numbers=bool(backend.regional),
        forget=session.reset,
    )


def run_as_model(module: nn.Module, label: str, enabled: Enabled, run: Callable[..., Any]) -> None:
    """Let calls of ``module`` go through ``run``, as calls of a whole model of the session."""
    session = enabled.session
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    # The module is held weakly: what it is called through must not keep it alive.
    reference = weakref.ref(module)
    memo: dict[str, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        assert alive is not None  # it is being called
        model_call = ModelCall(
            *(session, alive, label),
            lambda: named_timesteps({**dict(zip(names, args, strict=False)), **kwargs}),
            memo,
            lambda: patches_of(alive, (*args, *kwargs.values())),
        )
        with running_model(model_call):
            result = run(*args, **kwargs)
        session.after_model_call(model_call)
        return result

    _replace_call(module, call, enabled)
    enabled._modules.append(reference)
    if callable(getattr(module, "cache_context", None)):
        enabled._undo.append(name_branches(module))


def patches_of(module: nn.Module, inputs: Sequence[Any]) -> int | None:
    """How many patches the video among ``inputs`` has, [B, C, F, H, W] or [B, F, C, H, W], by what models say of
    themselves in their configuration or as attributes; None where that does not tell."""

    def said(name: str) -> Any:
        return getattr(getattr(module, "config", None), name, None) or getattr(module, name, None)

    patch, channels = said("patch_size"), said("in_channels")
    if isinstance(patch, int):
        patch = (said("patch_size_t") or 1, patch, patch)
    video = next((x for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 5), None)
    if video is None or channels not in video.shape[1:3] or not isinstance(patch, (list, tuple)) or len(patch) != 3:
        return None
    frames = video.shape[2] if video.shape[1] == channels else video.shape[1]
    return math.prod(-(-size // step) for size, step in zip((frames, *video.shape[3:]), patch, strict=True))


def _replace_call(module: nn.Module, call: Callable[..., Any], enabled: Enabled) -> None:
    """Let calls of ``module`` go to ``call``; ``enabled`` learns how to undo it."""
    # A compilation around an enabled module must not reach into it: what is compiled inside brings its own compiler.
    enabled._undo.append(replace_call(module, torch.compiler.disable(call)))
