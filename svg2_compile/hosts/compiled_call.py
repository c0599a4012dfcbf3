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
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from svg2_compile.hosts.dynamo import enabled_dynamo_settings
from svg2_compile.hosts.host_reads import MOST_NUMBERS_OF_AN_ARGUMENT, Answerer, NumbersWanted, may_ask
from svg2_compile.logs.logger import Once

__all__ = ["CompiledCall"]


class Numbers(NamedTuple):
    """An integer tensor as Python ints."""

    values: Any
    dtype: torch.dtype


class CompiledCall:
    """Calls ``module`` compiled.

    Args:
        module: what to call.
        backend, fullgraph, dynamic: as of torch.compile.
        once: what speaks.
        read_numbers: hand small integer tensors over as ints where the module reads them. For blocks: a whole model's
            small integer tensor is its timestep.
        forget: called before the first call is made anew, because a disabled function must not be traced.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Callable[..., Any],
        once: Once,
        *,
        fullgraph: bool,
        dynamic: bool | None,
        read_numbers: bool,
        forget: Callable[[], None],
    ) -> None:
        self._module = module
        self._options: dict[str, Any] = {"backend": backend, "fullgraph": fullgraph, "dynamic": dynamic}
        self._compiled = torch.compile(module._call_impl, **self._options)
        self._with_numbers = torch.compile(_call_with_numbers, **self._options)
        self._once = once
        forward = module.forward
        code = getattr(forward, "__code__", None)
        self._codes = (code, _call_with_numbers.__code__) if read_numbers and code is not None else ()
        self._positions: dict[int | str, int] = {
            name: i for i, name in enumerate(inspect.signature(forward).parameters)
        }
        self._wanted: frozenset[int | str] = frozenset()
        self._refused: frozenset[int | str] = frozenset()
        self._look_through = True
        self._checked: set[str] = set()
        self._forget = forget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with enabled_dynamo_settings(self._look_through) as lesson:
            result = self._run(args, kwargs)
            new = set(lesson.looked_through) - self._checked
            self._say(lesson.breaks)
        if not new or not self._look_through:
            return result
        self._checked |= new
        if self._tracing_is_right(args, kwargs):
            return result
        self._obey(new)
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
                may_ask.reset(token)

    def _converted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = tuple(_as_numbers(arg) if index in self._wanted else arg for index, arg in enumerate(args))
        return positional, {name: _as_numbers(arg) if name in self._wanted else arg for name, arg in kwargs.items()}

    def _tracing_is_right(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the model traced through its disabled functions, and run dense, gives what it gives as it stands."""
        with torch.random.fork_rng(), torch.no_grad():
            seed = torch.random.get_rng_state()
            expected = tree_leaves(self._module._call_impl(*args, **kwargs))
            torch.random.set_rng_state(seed)
            with enabled_dynamo_settings():
                traced = torch.compile(self._module._call_impl, backend="eager")
                actual = tree_leaves(traced(*args, **kwargs))
        pairs = zip(expected, actual, strict=True)
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)

    def _obey(self, names: set[str]) -> None:
        self._look_through = False
        self._once.warning(
            "disabled functions",
            "%s: traced, torch.compiler.disable notwithstanding, it gives another result. It runs eagerly, as the "
            "decorator says; attention next to it may stay dense.",
            ", ".join(sorted(names)),
        )
        torch._dynamo.reset()
        self._forget()


def _call_with_numbers(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a module with tensors in the place of numbers."""
    positional = [_as_tensor(arg) for arg in args]
    return module._call_impl(*positional, **{name: _as_tensor(arg) for name, arg in kwargs.items()})


def _as_tensor(argument: Any) -> Any:
    return torch.tensor(argument.values, dtype=argument.dtype) if type(argument) is Numbers else argument


def _as_numbers(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor) or argument.numel() > MOST_NUMBERS_OF_AN_ARGUMENT:
        return argument
    return argument if argument.device.type != "cpu" else Numbers(argument.tolist(), argument.dtype)
