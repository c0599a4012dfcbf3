"""Which denoising step is this? Two clocks that answer: one tied to a scheduler, one that watches the timestep.

The denoising loop is a loop that the compiler cannot see. A compiled graph is only called, again and again: by step,
by classifier-free-guidance branch and, where blocks are compiled alone, by layer. A clock turns each call into a
:class:`Tick`. Both clocks keep their count per *layer* (an object that stands for the weights of one call), so that a
graph that many layers or several models share is counted right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["SchedulerClock", "StepClock", "Tick", "TimeReading", "TimestepClock", "dense_step_count"]

# More calls than this at one timestep are taken for repeated calls, not for guidance branches (cond, uncond, skipped
# layers, perturbed attention ...). It bounds how many sets of centroids repeated calls at one timestep can create.
MAX_CONTEXTS = 8


@dataclass(frozen=True)
class Tick:
    """When a call happens.

    video: counts videos. step: counts denoising steps in the video, from 0. context: counts calls in the step (the
    guidance branches), from 0. num_steps: length of the schedule, None if unknown. progress: fraction of the
    schedule that lies behind, None if unknown.
    """

    video: int
    step: int
    context: int
    num_steps: int | None = None
    progress: float | None = None


@dataclass(frozen=True)
class TimeReading:
    """What a call's inputs tell about time.

    kind: "timestep" (values are the timesteps themselves) or "modulation" (values sample tensors made from it).
    values: empty if the graph has no input that tells.
    """

    kind: str
    values: tuple[float, ...]


class StepClock(Protocol):
    """Turns calls into ticks."""

    # Whether tick() wants a reading, which costs a host read of a few numbers per model call.
    needs_reading: bool

    def tick(self, layer: Any, reading: TimeReading | None) -> Tick | None:
        """The tick of one call of ``layer``; None if time cannot be told."""

    def reset(self) -> None:
        """Forget everything; the next call begins a video."""


class SchedulerClock:
    """Exact: told by the pipeline's scheduler when a video begins and when a step ends. Reads nothing from a device."""

    needs_reading = False

    def __init__(self) -> None:
        self.video = 0
        self.step = 0
        self.num_steps: int | None = None
        self._calls: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def begin_video(self, num_steps: int | None) -> None:
        """A new schedule was set: the next call is step 0 of another video."""
        self.video += 1
        self.step = 0
        self.num_steps = num_steps

    def end_step(self) -> None:
        """The scheduler made a step."""
        self.step += 1

    def tick(self, layer: Any, reading: TimeReading | None) -> Tick:
        video, step, calls = self._calls.get(layer, (self.video, self.step, 0))
        if (video, step) != (self.video, self.step):
            calls = 0
        self._calls[layer] = (self.video, self.step, calls + 1)
        progress = self.step / self.num_steps if self.num_steps else None
        return Tick(self.video, self.step, calls % MAX_CONTEXTS, self.num_steps, progress)

    def reset(self) -> None:
        self.begin_video(self.num_steps)
        self._calls.clear()


@dataclass
class _Watch:
    """What TimestepClock remembers of one layer."""

    video: int = 0
    step: int = 0
    context: int = 0
    values: tuple[float, ...] | None = None
    first: tuple[float, ...] | None = None
    direction: int = 0
    seen: set[tuple[float, ...]] = field(default_factory=set)

    def begin_video(self, values: tuple[float, ...]) -> None:
        self.video += 1
        self.step = 0
        self.context = 0
        self.values = self.first = values
        self.direction = 0
        self.seen = {values}


class TimestepClock:
    """Watches the inputs: a new timestep is the next step, the same one the next guidance branch.

    A new video is seen by the timestep going back: against the direction of the schedule or, where only tensors made
    from the timestep are visible, to values seen earlier in the video.
    """

    needs_reading = True

    def __init__(self) -> None:
        self._watches: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def tick(self, layer: Any, reading: TimeReading | None) -> Tick | None:
        if reading is None or not reading.values:
            return None
        watch = self._watches.get(layer)
        if watch is None:
            watch = self._watches[layer] = _Watch(video=-1)
            watch.begin_video(reading.values)
        else:
            self._observe(watch, reading)
        return Tick(watch.video, watch.step, watch.context, None, _progress(watch, reading))

    def reset(self) -> None:
        self._watches.clear()

    def forget(self, layer: Any) -> None:
        """Let the next call of ``layer`` begin a video (after an exception in the middle of one)."""
        self._watches.pop(layer, None)

    @staticmethod
    def _observe(watch: _Watch, reading: TimeReading) -> None:
        values = reading.values
        if values == watch.values:
            watch.context += 1
            if watch.context >= MAX_CONTEXTS:
                watch.begin_video(values)
            return
        if reading.kind == "timestep":
            direction = _direction(watch.values or values, values)
            if watch.direction and direction == -watch.direction:
                watch.begin_video(values)
                return
            watch.direction = direction or watch.direction
        elif values in watch.seen:
            watch.begin_video(values)
            return
        watch.seen.add(values)
        watch.values = values
        watch.step += 1
        watch.context = 0


def _direction(before: tuple[float, ...], after: tuple[float, ...]) -> int:
    """+1 or -1: the way in which the first value that changed moved; 0 if none did."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            return 1 if new > old else -1
    return 0


def _progress(watch: _Watch, reading: TimeReading) -> float | None:
    """How far the timestep has moved, as a fraction of its range ([0, 1000], or [0, 1] where it never exceeds 1)."""
    if reading.kind != "timestep" or watch.first is None:
        return None
    moved = max(abs(new - old) for new, old in zip(reading.values, watch.first, strict=False))
    largest = max(abs(value) for value in (*reading.values, *watch.first))
    return min(moved / (1000.0 if largest > 1.0 else 1.0), 1.0)


def dense_step_count(dense_steps: int | float, num_steps: int) -> int:
    """The number of dense steps at the start of a schedule of ``num_steps``: a count, or a fraction rounded up."""
    if isinstance(dense_steps, int):
        return dense_steps
    return math.ceil(dense_steps * num_steps - 1e-9)
