"""The backend "svg2": attentions of models that run uncompiled, with state by model, layer, step and branch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from svg2_compile.eager import AttentionState, CallOptions, attend, eager_config
from svg2_compile.hosts.diffusers import expected_layers
from svg2_compile.hosts.in_place import Enabled, is_enabled, register, run_as_model
from svg2_compile.integrations.diffusers.direct import DirectAttention
from svg2_compile.integrations.diffusers.frames import Caller, caller_of_attention
from svg2_compile.integrations.diffusers.registry import (
    add_backend,
    native_attention,
    uses_dispatcher,
    when_set,
)
from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.passes.eager_layout import EagerLayout, lay_out
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.runtime.model_call import ModelCall, current_call, running_model
from svg2_compile.runtime.session import Session
from svg2_compile.runtime.time_reader import named_timesteps

__all__ = ["NAME", "register_backend"]

NAME = "svg2"
_once = Once(get_logger())
_noting: ContextVar[EagerLayout | None] = ContextVar("svg2_noting", default=None)
_attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()
_options: dict[str, Any] = {}


def register_backend(**options: Any) -> None:
    """Make ``model.set_attention_backend("svg2")`` possible. Calling it again changes the options of later models.

    From the moment that a model is set to it, ``svg2_compile.report(model)``, ``reset`` and ``disable`` know
    it. Where the video is in its attentions is found by running its code once on tensors without data.

    Args:
        **options: the fields of Svg2Config, for every model that is set to the backend.

    Raises:
        BackendUnsupported: diffusers is missing, or of a version whose private parts are not known.
        ConfigError: an option is unknown or out of range.
    """
    eager_config(options)
    add_backend(NAME, _attention)
    when_set(_was_set)
    _options.clear()
    _options.update(options)


def _was_set(model: nn.Module, name: str) -> None:
    attached = _attached.get(model)
    if attached is not None:
        attached.detach()
    if name == NAME and not is_enabled(model):
        _attached[model] = _Attached(model)


class _Attached:
    """A model whose attentions are computed here: its state, and where the video is, by the shapes of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        session = Session(eager_config(_options), expected_layers=expected_layers)
        self.state = AttentionState.of_session(session)
        self._paths = _paths_of(model)
        self._layouts: dict[Hashable, Any] = {}
        self._direct = not uses_dispatcher(model)
        # The call that is under way where a model is first met in the midst of it.
        self.first_call: ModelCall | None = None
        self._enabled = Enabled(model, session)
        reference = weakref.ref(model)
        self._enabled._undo.append(lambda: _forget(reference()))
        run_as_model(model, "", self._enabled, functools.partial(_run, reference, self))
        register(model, self._enabled)

    def detach(self) -> None:
        """Put back what was there."""
        self._enabled.disable()

    def met_in(self, caller: Caller) -> None:
        """The model is first met inside of a call, which nobody has wrapped."""
        names = list(inspect.signature(type(caller.model).forward).parameters)[1:]
        arguments = {**dict(zip(names, caller.args, strict=False)), **caller.kwargs}
        self.first_call = ModelCall(self.state.session, caller.model, "", lambda: named_timesteps(arguments))

    def layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Where the video is in every attention of a call of the model."""
        key = _shapes(args, kwargs)
        if key not in self._layouts:
            self._layouts[key] = lay_out(model, args, kwargs, self._noting)
        return self._layouts[key]

    def path(self, module: nn.Module, model: nn.Module) -> str:
        """What reports call a layer."""
        if id(module) not in self._paths:  # adapters bring modules
            self._paths = {**_paths_of(model), **self._paths}
        return self._paths.get(id(module), type(module).__name__)

    def attending(self) -> AbstractContextManager[Any]:
        """While inside, what the model computes by PyTorch's attention comes here as well, if nothing else does."""
        return DirectAttention(_attention) if self._direct else contextlib.nullcontext()

    @contextlib.contextmanager
    def _noting(self, layout: EagerLayout) -> Iterator[None]:
        token = _noting.set(layout)
        try:
            with self.attending():
                yield
        finally:
            _noting.reset(token)

    @contextlib.contextmanager
    def in_call(self) -> Iterator[None]:
        """While inside, attentions belong to the call of the model that is under way."""
        if current_call(self.state.session) is not None or self.first_call is None:
            self.first_call = None
            yield
            return
        with running_model(self.first_call):
            yield


def _run(model: weakref.ref[nn.Module], attached: _Attached, *args: Any, **kwargs: Any) -> Any:
    alive = model()
    assert alive is not None  # it is being called
    # Before the call, in which a cache may exchange the blocks of the model for its own.
    attached.layout(alive, args, kwargs)
    with attached.attending():
        return alive._call_impl(*args, **kwargs)


def _forget(model: nn.Module | None) -> None:
    if model is not None:
        _attached.pop(model, None)


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((name, tuple(value.shape)) for name, value in named if isinstance(value, torch.Tensor))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Attention as diffusers calls it: all tensors [B, N, H, D]."""
    if _parallel_config is not None:
        raise ValueError(
            "attention backend 'svg2' was called with context parallelism, of which it sees a part of the tokens. "
            "Valid: svg2_compile.enable(pipe), or another backend."
        )
    options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    options["enable_gqa"] = enable_gqa
    if torch.compiler.is_compiling():
        return native_attention(query, key, value, **options)  # a compiler is to see it, ours too
    caller = caller_of_attention()
    layout = _noting.get()
    if layout is not None and isinstance(query, FakeTensor):
        if caller is not None:
            place = layout.originals.get(id(caller.module)), query.shape[1], key.shape[1]
            layout.note(place, query, key, value)
        return native_attention(query, key, value, **options)
    if caller is None or dropout_p:
        reason = "dropout is wanted: call model.eval()" if dropout_p else "no module calls it"
        _once.warning(reason, "attention backend 'svg2' computes a call densely: %s.", reason)
        return native_attention(query, key, value, **options)
    return _attend(caller, [query, key, value], attn_mask, CallOptions(is_causal, scale, True))


def _attend(
    caller: Caller, tensors: list[torch.Tensor], attn_mask: torch.Tensor | None, options: CallOptions
) -> torch.Tensor:
    attached = _attached.get(caller.model)
    if attached is None:
        if is_enabled(caller.model):
            _once.warning("enabled", "a model is enabled and has attention backend 'svg2': the latter is dense there.")
            return native_attention(*tensors, attn_mask=attn_mask, is_causal=options.is_causal, scale=options.scale)
        attached = _attached[caller.model] = _Attached(caller.model)
        attached.met_in(caller)
    place = id(caller.module), tensors[0].shape[1], tensors[1].shape[1]
    layout = attached.layout(caller.model, caller.args, caller.kwargs)
    parts = layout if isinstance(layout, StaysDense) else layout.get(place, _NOT_MET)
    heads_first = [tensor.transpose(1, 2) for tensor in tensors]
    inputs = heads_first if attn_mask is None else [*heads_first, attn_mask]
    with attached.in_call():
        path = attached.path(caller.module, caller.model)
        return attend(attached.state, inputs, options, parts, path).transpose(1, 2)


_NOT_MET = StaysDense("unknown_layout", "the model took another way when it was followed on tensors without data")


def _paths_of(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}
