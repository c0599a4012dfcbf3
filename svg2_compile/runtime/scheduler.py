"""Observe a scheduler object: when a schedule is set, and when a step is made.

For schedulers that keep no count of their own, and for those who time steps.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from svg2_compile.runtime.pipelines import Same

__all__ = ["SchedulerHook", "StepCount"]


class _Observed:
    """A bound method of a scheduler that also tells somebody. Looks like the method to ``inspect.signature``.

    A deep copy of the scheduler gets the plain method back: pipelines copy schedulers, and a copy is not the one that
    is observed.
    """

    def __init__(self, method: Callable[..., Any], after: Callable[[], None]) -> None:
        functools.update_wrapper(self, method)
        self.__signature__ = inspect.signature(method)
        self._method = method
        self._after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self._after()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = getattr(self._method, "__self__", None)
        copied = memo.get(id(owner))
        if copied is None:
            return self._method
        return types.MethodType(self._method.__func__, copied)  # type: ignore[attr-defined]


class SchedulerHook:
    """Observes ``set_timesteps`` and ``step`` of one scheduler object until removed.

    Args:
        scheduler: any object with these two methods and a ``timesteps`` attribute (diffusers' schedulers).
        on_schedule, on_step: called after the one and the other.

    Raises:
        TypeError: the object has no such methods.
    """

    def __init__(self, scheduler: Any, on_schedule: Callable[[], None], on_step: Callable[[], None]) -> None:
        for name in ("set_timesteps", "step"):
            if not callable(getattr(scheduler, name, None)):
                raise TypeError(
                    f"scheduler: expected an object with set_timesteps() and step(), as diffusers' schedulers have; "
                    f"{type(scheduler).__name__} has no {name}()"
                )
        self._scheduler = scheduler
        self._before = {name: vars(scheduler).get(name) for name in ("set_timesteps", "step")}
        scheduler.set_timesteps = _Observed(scheduler.set_timesteps, on_schedule)
        scheduler.step = _Observed(scheduler.step, on_step)

    def remove(self) -> None:
        """Put back exactly what was there."""
        for name, before in self._before.items():
            if before is None:
                vars(self._scheduler).pop(name, None)
            else:
                setattr(self._scheduler, name, before)


class StepCount:
    """Counts the steps of the scheduler that a target has now; follows when the target gets another one.

    Args:
        over: called with the scheduler when all steps of its schedule were made.
    """

    def __init__(self, over: Callable[[Any], None] = lambda scheduler: None) -> None:
        self._over = over
        self._hook: SchedulerHook | None = None
        self._hooked: Same | None = None
        self._steps = 0

    def follow(self, scheduler: Any) -> None:
        """Observe ``scheduler`` from now on.

        Raises:
            TypeError: it has no ``set_timesteps`` and ``step``.
        """
        if self._hooked is None or not self._hooked(scheduler):
            self.stop()
            self._hook = SchedulerHook(scheduler, self._begin, lambda: self._step(scheduler))
            self._hooked = Same(scheduler)
            self._steps = 0

    def steps_of(self, scheduler: Any) -> int | None:
        """Steps made since the schedule was set; None for a scheduler that is not observed."""
        return self._steps if self._hooked is not None and self._hooked(scheduler) else None

    def stop(self) -> None:
        """Take the observation off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._hooked = None

    def _begin(self) -> None:
        self._steps = 0

    def _step(self, scheduler: Any) -> None:
        self._steps += 1
        if self._steps == len(scheduler.timesteps):
            self._over(scheduler)
