"""What a pipeline tells while it is being called: its scheduler as it is now, whatever object that is.

Pipelines share a transformer, copy their schedulers for every request, exchange them between two videos. So nothing is
remembered of them: the pipeline that makes a call is found among the callers of the call, at every model call, and its
scheduler is asked where it stands. Nothing is read from a device.
"""

from __future__ import annotations

import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch

__all__ = ["Same", "SchedulerView", "running_pipeline", "view_of"]

# A pipeline is `self` of its __call__, or `components` of a block of a modular one.
_OWNERS = ("self", "components")
_owner_in: dict[CodeType, str] = {}
# Modules and compiled graphs are no pipelines, and the locals of a frame take long to ask for.
_NO_PIPELINES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def running_pipeline() -> Any:
    """The innermost pipeline whose ``__call__`` is running in this thread; None if none is.

    A pipeline is any object with a scheduler, that is with ``timesteps`` and ``step``.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__":
            owner = _owner_in.get(code)
            if owner is None:
                owner = _owner_in[code] = _owner_of(code)
            pipeline = frame.f_locals.get(owner) if owner else None
            # A module is none, and takes long to say that it has no such attribute.
            is_module = isinstance(pipeline, torch.nn.Module)
            if pipeline is not None and not is_module and _is_scheduler(getattr(pipeline, "scheduler", None)):
                return pipeline
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _owner_of(code: CodeType) -> str:
    """The local variable of a ``__call__`` that may be a pipeline; empty if none can be."""
    if code.co_filename.startswith(_NO_PIPELINES):
        return ""
    return next((name for name in _OWNERS[::-1] if name in code.co_varnames), "")


def _is_scheduler(found: Any) -> bool:
    return found is not None and hasattr(found, "timesteps") and callable(getattr(found, "step", None))


class Same:
    """Remembers an object without keeping it alive, to ask later whether another is the very same."""

    __slots__ = ("_reference",)

    def __init__(self, found: Any) -> None:
        try:
            self._reference: Any = weakref.ref(found)
        except TypeError:  # a list or a number: small enough to keep
            self._reference = lambda: found

    def __call__(self, other: Any) -> bool:
        return other is not None and self._reference() is other

    @property
    def alive(self) -> bool:
        """Whether the object is still there."""
        return self._reference() is not None


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """Where a scheduler stands now.

    index: of the step that comes next in ``timesteps``, None before the first step and where it keeps no count. begin:
    the index that the run started at, None if nobody said. length: of the whole schedule. announced: how many steps the
    pipeline will make, None if it does not say. current: an object that is another one in every step, None where there
    is none. counted: steps made since the schedule was set,
    None where nobody counts.
    """

    scheduler: Any
    timesteps: Any
    index: int | None
    begin: int | None
    length: int | None
    announced: int | None
    current: Any
    counted: int | None

    @property
    def tells(self) -> bool:
        """Whether steps can be told from it at all; not where an earlier run has left it at its end."""
        if self.timesteps is None or (self.index is not None and self.index >= len(self.timesteps)):
            return False
        return self.index is not None or self.current is not None or self.counted is not None


def view_of(scheduler: Any, pipeline: Any = None, counted: int | None = None) -> SchedulerView:
    """What ``scheduler`` tells now; ``pipeline``: the one that is being called with it, if one is."""
    timesteps = getattr(scheduler, "timesteps", None)
    index, begin = _integer(scheduler, "step_index"), _integer(scheduler, "begin_index")
    length = None
    if timesteps is not None and hasattr(timesteps, "__len__") and getattr(timesteps, "ndim", 1) == 1:
        length = len(timesteps)
    current = announced = None
    if pipeline is not None:
        # Set anew by the pipeline's loop: the tensor of this step, and the number of steps that it will make.
        current = getattr(pipeline, "_current_timestep", None)
        announced = _integer(pipeline, "_num_timesteps") or None
        if announced is not None and index is not None and length is not None and announced > length:
            announced = None  # where the scheduler counts, more steps than it has are those of several loops
    return SchedulerView(scheduler, timesteps, index, begin, length, announced, current, counted)


def _integer(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
