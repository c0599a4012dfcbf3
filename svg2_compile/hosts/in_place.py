"""Enabled: a target whose modules are called through the compiler until it is disabled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from svg2_compile.backend import Svg2Backend
from svg2_compile.hosts.compiled_call import CompiledCall
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.session import Session, report_of

__all__ = ["Enabled", "compile_in_place", "enabled_of", "register", "replace_call"]

_enabled: weakref.WeakKeyDictionary[Any, Enabled] = weakref.WeakKeyDictionary()


class Enabled:
    """A pipeline or module that runs sparse. Also a context manager that disables at its end.

    Attributes:
        session: clock, centroids, history and compiled programs.
        modules: the modules that were compiled.
    """

    def __init__(self, target: Any, session: Session) -> None:
        self.session = session
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
        """Put back exactly what was there."""
        while self._undo:
            self._undo.pop()()
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


def compile_in_place(
    module: nn.Module, label: str, backend: Svg2Backend, enabled: Enabled, *, fullgraph: bool, dynamic: bool | None
) -> None:
    """Let calls of ``module`` run compiled."""
    session = enabled.session
    compiled = CompiledCall(
        module,
        backend,
        session.once,
        fullgraph=fullgraph,
        dynamic=dynamic,
        read_numbers=bool(backend.regional),
        forget=session.reset,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        with session.scope.running(module, label):
            result = compiled(*args, **kwargs)
        if not backend.graphs:
            session.once.warning(
                "no graph",
                "%s runs eagerly and dense: Dynamo handed over no graph of it (after too many recompilations it gives "
                "a function up for good; torch._dynamo.reset() starts over).",
                type(module).__name__,
            )
        return result

    replace_call(module, call, enabled)


def replace_call(module: nn.Module, call: Callable[..., Any], enabled: Enabled) -> None:
    """Let calls of ``module`` go to ``call``; ``enabled`` learns how to undo it."""
    before = module._compiled_call_impl
    module._compiled_call_impl = call
    reference = weakref.ref(module)
    enabled._modules.append(reference)

    def undo() -> None:
        alive = reference()
        if alive is not None:
            alive._compiled_call_impl = before

    enabled._undo.append(undo)
