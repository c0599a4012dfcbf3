"""Where a call stands: request, video, step of how many, guidance branch. What the caller says, and what is known.

What is said travels in a context variable, so that threads and coroutines never see each other's:

    with svg2_compile.denoising(request="a", step=7, num_steps=50, branch="cond"):
        model(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

__all__ = ["Said", "Standing", "branch_named", "denoising", "said_now"]


@dataclass(frozen=True, slots=True)
class Said:
    """What a caller says of its calls; None where it says nothing. See :func:`denoising`."""

    request: Hashable = None
    step: int | None = None
    num_steps: int | None = None
    branch: Hashable = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one call stands.

    request: a text for reports. video: counts the videos of a session, whatever their requests. step: counts steps that
    run, from 0. num_steps: how many will run, None if unknown. branch: tells the model calls of one step apart.
    context: the branch as a number, in order of appearance. timestep: the largest that was read, None where none was.
    progress: how far the timestep has moved, as a fraction of its range. estimated_steps: num_steps as the spacing of
    the timesteps suggests it, where it is unknown. source: who told the step: "context", "scheduler", "timestep" or
    "modulation".
    """

    request: str
    video: int
    step: int
    num_steps: int | None
    branch: Hashable
    context: int
    source: str
    timestep: float | None = None
    progress: float | None = None
    estimated_steps: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether no step follows this one, as far as is known."""
        return self.num_steps is not None and self.step >= self.num_steps - 1


_said: ContextVar[Said] = ContextVar("svg2_denoising", default=Said())  # noqa: B039 (frozen)


def said_now() -> Said:
    """What the caller says of the calls that it makes now."""
    return _said.get()


@contextlib.contextmanager
def denoising(
    *, request: Hashable = None, step: int | None = None, num_steps: int | None = None, branch: Hashable = None
) -> Iterator[None]:
    """Say where the model calls inside the ``with`` block stand. Every part is optional; what is left out is found.

    Centroids of one request never reach another. Contexts nest: an inner one adds to what the outer one says; one for
    another request starts anew.

    Args:
        request: anything hashable that tells denoising loops apart which share a model (None: found from the pipeline,
            or from the order of timesteps).
        step: the step that runs, from 0. Going back begins another video of the request.
        num_steps: how many steps run; fractions (``dense_steps=0.2``) are of this number.
        branch: tells the model calls of one step apart ("cond", "uncond", a window ...). Several calls of one branch in
            one step are told apart by their order.

    Raises:
        TypeError: a step is no integer, or request or branch is not hashable.
        ValueError: a number is out of range.
    """
    _check(request=request, step=step, num_steps=num_steps, branch=branch)
    outer = _said.get()
    if request is not None and request != outer.request:
        outer = Said()
    inner = Said(
        outer.request if request is None else request,
        outer.step if step is None else step,
        outer.num_steps if num_steps is None else num_steps,
        outer.branch if branch is None else branch,
    )
    if inner.step is not None and inner.num_steps is not None and inner.step >= inner.num_steps:
        raise ValueError(f"denoising: step is {inner.step} of num_steps={inner.num_steps}. Valid: 0 to num_steps - 1.")
    token = _said.set(inner)
    try:
        yield
    finally:
        _said.reset(token)


@contextlib.contextmanager
def branch_named(name: Hashable) -> Iterator[None]:
    """While inside, calls belong to the guidance branch ``name``, unless the caller says another."""
    outer = _said.get()
    token = _said.set(outer if outer.branch is not None else replace(outer, branch=name))
    try:
        yield
    finally:
        _said.reset(token)


def _check(*, request: Hashable, step: int | None, num_steps: int | None, branch: Hashable) -> None:
    for name, value in (("request", request), ("branch", branch)):
        try:
            hash(value)
        except TypeError:
            raise TypeError(f"denoising: {name} is {value!r}. Valid: anything hashable, or None.") from None
    for name, number, least in (("step", step, 0), ("num_steps", num_steps, 1)):
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"denoising: {name} is {number!r}. Valid: an integer of at least {least}, or None.")
        if number < least:
            raise ValueError(f"denoising: {name} is {number}. Valid: an integer of at least {least}, or None.")
