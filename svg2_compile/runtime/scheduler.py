"""Tie a SchedulerClock to a scheduler object: a new schedule is a new video, each step the next step."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from svg2_compile.runtime.clock import SchedulerClock

__all__ = ["SchedulerHook"]


class _Observed:
    """A bound method of a scheduler that also tells the clock. Looks like the method to ``inspect.signature``.

    A deep copy of the scheduler gets the plain method back: pipelines copy schedulers, and a copy is not the one that
    was enabled.
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
        clock: what to tell.

    Raises:
        TypeError: the object has no such methods.
    """

    def __init__(self, scheduler: Any, clock: SchedulerClock) -> None:
        for name in ("set_timesteps", "step"):
            if not callable(getattr(scheduler, name, None)):
                raise TypeError(
                    f"scheduler: expected an object with set_timesteps() and step(), as diffusers' schedulers have; "
                    f"{type(scheduler).__name__} has no {name}()"
                )
        self._scheduler = scheduler
        self._clock = clock
        self._before = {name: vars(scheduler).get(name) for name in ("set_timesteps", "step")}
        scheduler.set_timesteps = _Observed(scheduler.set_timesteps, self._begin_video)
        scheduler.step = _Observed(scheduler.step, clock.end_step)

    def remove(self) -> None:
        """Put back exactly what was there."""
        for name, before in self._before.items():
            if before is None:
                vars(self._scheduler).pop(name, None)
            else:
                setattr(self._scheduler, name, before)

    def _begin_video(self) -> None:
        timesteps = getattr(self._scheduler, "timesteps", None)
        self._clock.begin_video(len(timesteps) if timesteps is not None else None)
