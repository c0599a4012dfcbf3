"""Where a call of the model stands: ComfyUI says it in ``transformer_options``.

sample_sigmas    the schedule that is being sampled, one more than there are steps
sigmas           the noise level of this call, one for every sample
cond_or_uncond   whose conditions are in the batch: [0] positive, [1] negative, [1, 0] both
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["step_of", "tell_steps"]

_TOLERANCE = 1e-4
_OPTIONS = 5  # the place of transformer_options among the arguments of apply_model


def tell_steps() -> Callable[..., Any]:
    """A wrapper of apply_model that says where the calls inside it stand."""
    schedule = _Schedule()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        from svg2_compile import denoising

        options = kwargs.get("transformer_options") or (args[_OPTIONS] if len(args) > _OPTIONS else {})
        with denoising(**schedule.standing(options or {})):
            return executor(*args, **kwargs)

    return wrapper


class _Schedule:
    """The schedule that is being sampled, read from its device once."""

    def __init__(self) -> None:
        self._tensor: Callable[[], Any] = lambda: None
        self._sigmas: list[float] = []

    def standing(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What ``denoising`` is told of a call with these transformer_options."""
        said: dict[str, Any] = {}
        if options.get("cond_or_uncond") is not None:
            said["branch"] = tuple(options["cond_or_uncond"])
        schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
        if schedule is None or sigmas is None or len(schedule) < 2:
            return said
        if self._tensor() is not schedule:
            self._tensor, self._sigmas = weakref.ref(schedule), [float(sigma) for sigma in schedule]
        step = step_of(float(sigmas.max()), self._sigmas)
        return {**said, "step": step, "num_steps": len(self._sigmas) - 1}


def step_of(sigma: float, schedule: Sequence[float]) -> int:
    """The step of a noise level: that of the last level in the schedule that is not below it."""
    reached = [index for index, level in enumerate(schedule[:-1]) if level >= sigma * (1.0 - _TOLERANCE)]
    return reached[-1] if reached else 0
