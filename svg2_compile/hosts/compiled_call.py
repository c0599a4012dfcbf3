"""CompiledCall: a module called through torch.compile, with what only the caller can do about host reads and breaks.

A block that is compiled alone may be handed its grid sizes as a small integer tensor and read them with tolist(): then
their numbers go in as Python ints, and the tensor is made inside the compiled call, where they are known:

    block(x, grid=tensor([[5, 8, 12]]))   ->   block(x, grid=torch.tensor([[5, 8, 12]]) of three ints)

Functions under torch.compiler.disable are traced all the same. The first call in which that happens is checked: the
traced model must give what the model gives as it stands, or the decorator is obeyed from there on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from svg2_compile.hosts.dynamo import enabled_dynamo_settings
from svg2_compile.hosts.host_reads import MOST_NUMBERS_OF_AN_ARGUMENT, Answerer, NumbersWanted, may_ask
from svg2_compile.hosts.kept_state import kept_state
from svg2_compile.hosts.visible_attention import attend_alone
from svg2_compile.logs.logger import Once, get_logger

__all__ = ["CompiledCall", "OwnCode"]


log = get_logger()


class Numbers(NamedTuple):
    """An integer tensor as Python ints."""

    values: Any
    dtype: torch.dtype


class OwnCode:
    """Functions that call modules, with code objects of their own: one for all modules of a class.

    Dynamo counts compilations by code object, and gives a function up after too many. If every enabled model were
    compiled as the forward of its class, a process that enables a pipeline for each request would use that up.
    """

    def __init__(self) -> None:
        self._code: dict[tuple[str, type], CodeType] = {}

    def call_of(self, module: nn.Module) -> Callable[..., Any]:
        """Calls ``module``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)

        return self._own(call, module)

    def call_with_numbers(self, module: nn.Module) -> Callable[..., Any]:
        """Calls a module, its first argument, with tensors in the place of numbers."""

        def call_with_numbers(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            positional = [_as_tensor(arg) for arg in args]
            return module._call_impl(*positional, **{name: _as_tensor(arg) for name, arg in kwargs.items()})

        return self._own(call_with_numbers, module)

    def attention_of(self, module: nn.Module) -> Callable[..., Any]:
        """The attention of ``module``, where Dynamo sees nothing around it."""
        attend = torch.nn.functional.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Any:
            return attend(*args, **kwargs)

        return self._own(attention, module)

    def _own(self, function: Any, module: nn.Module) -> Callable[..., Any]:
        kind = type(module)
        key = (function.__name__, kind)
        if key not in self._code:
            self._code[key] = function.__code__.replace(co_name=f"{function.__name__}_{kind.__name__}")
        function.__code__ = self._code[key]
        return function


# How diffusers and accelerate keep the hooks of a module.
_HOOKS = frozenset({"_diffusers_hook", "_hf_hook"})


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks that keep state are around a module: a call of it cannot be made again to compare."""
    if getattr(module, "is_cache_enabled", False):
        return True
    return not _HOOKS.isdisjoint(vars(module))


class CompiledCall:
    """Calls ``module`` compiled.

    Args:
        module: what to call.
        backend, fullgraph, dynamic: as of torch.compile.
        once: what speaks.
        code: shared by the modules that are enabled together.
        read_numbers: hand small integer tensors over as ints where the module reads them. For blocks: a whole model's
            small integer tensor is its timestep.
        forget: called before the first call is made anew, because a disabled function must not be traced.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Callable[..., Any],
        once: Once,
        code: OwnCode,
        *,
        fullgraph: bool,
        dynamic: bool | None,
        read_numbers: bool,
        forget: Callable[[], None],
    ) -> None:
        self._module = module
        self._options: dict[str, Any] = {"backend": backend, "fullgraph": fullgraph, "dynamic": dynamic}
        plain, with_numbers = code.call_of(module), code.call_with_numbers(module)
        self._compiled = torch.compile(plain, **self._options)
        self._with_numbers = torch.compile(with_numbers, **self._options)
        self._attention = torch.compile(code.attention_of(module), backend=backend, dynamic=dynamic)
        self._once = once
        self._codes = (plain.__code__, with_numbers.__code__) if read_numbers else ()
        self._positions: dict[int | str, int] = {
            name: i for i, name in enumerate(inspect.signature(module.forward).parameters)
        }
        self._wanted: frozenset[int | str] = frozenset()
        self._refused: frozenset[int | str] = frozenset()
        self._look_through = True
        self._checked: set[str] = set()
        self._forget = forget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        look_through = self._look_through and not _is_hooked(self._module)
        with enabled_dynamo_settings(look_through) as lesson:
            failed = False
            try:
                result = self._run(args, kwargs)
            except torch._dynamo.exc.InternalTorchDynamoError:
                failed = bool(lesson.looked_through)
                if not failed:
                    raise
                log.debug("what is disabled cannot be traced", exc_info=True)
            new = set(lesson.looked_through) - self._checked
            self._say(lesson.breaks)
        if failed:
            return self._obeying(new, args, kwargs)
        if not new or not self._look_through:
            return result
        self._checked |= new
        if self._tracing_is_right(args, kwargs):
            return result
        return self._obeying(new, args, kwargs)

    def _obeying(self, names: set[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of a call, made anew without looking through anything."""
        self._obey(names)
        with enabled_dynamo_settings(look_through=False):
            return self._run(args, kwargs)

    def _say(self, breaks: Mapping[str, str]) -> None:
        for place, reason in list(breaks.items()):
            self._once.warning(
                f"graph break {place}",
                "graph break at %s: the attention around it is judged in pieces, or runs eagerly. %s",
                *(place, reason),
            )

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        while True:
            token = may_ask.set(Answerer(self._codes, self._refused) if self._codes else None)
            attention = attend_alone.set(self._attention)
            try:
                if not self._wanted:
                    return self._compiled(*args, **kwargs)
                return self._with_numbers(self._module, *self._converted(args, kwargs))
            except NumbersWanted as wanted:
                place = wanted.place if wanted.place in kwargs else self._positions.get(wanted.place, wanted.place)
                if place in self._wanted:
                    self._refused |= {wanted.place}
                self._wanted |= {place}
            finally:
                attend_alone.reset(attention)
                may_ask.reset(token)

    def _converted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = tuple(_as_numbers(arg) if index in self._wanted else arg for index, arg in enumerate(args))
        return positional, {name: _as_numbers(arg) if name in self._wanted else arg for name, arg in kwargs.items()}

    def _tracing_is_right(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the model traced through its disabled functions, and run dense, gives what it gives as it stands."""

        def leaves_of(call: Callable[..., Any]) -> list[Any]:
            with kept_state(self._module):
                own_args, own_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))  # it may write to them
                return tree_leaves(call(*own_args, **own_kwargs))

        with torch.random.fork_rng(), torch.no_grad():
            seed = torch.random.get_rng_state()
            expected = leaves_of(self._module._call_impl)
            torch.random.set_rng_state(seed)
            with enabled_dynamo_settings():
                actual = leaves_of(torch.compile(self._module._call_impl, backend="eager"))
        pairs = zip(expected, actual, strict=True)
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)

    def _obey(self, names: set[str]) -> None:
        self._look_through = False
        self._once.warning(
            "disabled functions",
            "%s: traced, torch.compiler.disable notwithstanding, it fails or gives another result. It runs eagerly, as "
            "the decorator says; attention next to it may stay dense.",
            ", ".join(sorted(names)),
        )
        torch._dynamo.reset()
        self._forget()


def _as_tensor(argument: Any) -> Any:
    return torch.tensor(argument.values, dtype=argument.dtype) if type(argument) is Numbers else argument


def _as_numbers(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor) or argument.numel() > MOST_NUMBERS_OF_AN_ARGUMENT:
        return argument
    return argument if argument.device.type != "cpu" else Numbers(argument.tolist(), argument.dtype)
