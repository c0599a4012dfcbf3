"""Request: one denoising sequence, and what is known of where it stands."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any

from svg2_compile.runtime.pipelines import Same, SchedulerView
from svg2_compile.runtime.standing import Standing
from svg2_compile.runtime.time_reader import TimeReading

__all__ = ["Request", "estimated_steps"]

# Of timesteps that go from a thousand to zero, as most models count them, and of those that go from one.
_LARGE_RANGE, _SMALL_RANGE = 1000.0, 1.0


class Request:
    """The present video of one request. A new video is a new object.

    Attributes:
        key: what the request goes by. label: the same for reports. video: number of the video in the session.
        step: that runs now. num_steps: how many will run, None if unknown.
        sparse_calls, dense_reasons: what ran, to say so where nothing was sparse. first_sparse_step: None before it.
        used: the count of all calls of the session when this was last called. step_marks: the same at its last steps.
        owner: a weak reference to what the request lives as long as, or None.
        terms: what the ranks agreed on, by number of the program.
    """

    def __init__(self, key: Hashable, label: str, video: int) -> None:
        self.key = key
        self.label = label
        self.video = video
        self.step = 0
        self.num_steps: int | None = None
        self.sparse_calls = 0
        self.dense_reasons: Counter[str] = Counter()
        self.first_sparse_step: int | None = None
        self.used = 0
        self.step_marks: deque[int] = deque(maxlen=2)
        self.owner: Any = None
        self.terms: dict[int, Any] = {}
        self._timesteps: Same | None = None
        self._current: Same | None = None
        self._begin: int | None = None
        self._began_uncounted = False
        self._reading: TimeReading | None = None
        self._schedule: list[float] | None = None
        self._timestep: float | None = None
        self._history: list[tuple[float, ...]] = []
        self._direction = 0
        self._calls: Counter[Any] = Counter()
        self._usual_calls: Counter[Any] = Counter()
        self._branches: dict[Hashable, int] = {}

    # ------------------------------------------------------------------------------------------ steps from a scheduler
    def follow(self, view: SchedulerView) -> bool:
        """Move to the step that ``view`` tells. False if that is no step of this video."""
        if self._timesteps is None:
            self._timesteps = Same(view.timesteps)
            self._begin, self._began_uncounted = view.begin, view.index is None
        elif not self._timesteps(view.timesteps):
            return False
        step = self._step_of(view)
        self._current = None if view.current is None else Same(view.current)
        self.num_steps = view.announced
        if view.announced is None and view.length is not None:
            self.num_steps = view.length - (self._begin or 0)
        if step < self.step or (view.index is None and self.num_steps is not None and step >= self.num_steps):
            return False
        if self.num_steps is not None and step >= self.num_steps:
            self.num_steps = None  # more steps run than were announced
        self.move(step)
        return True

    def _step_of(self, view: SchedulerView) -> int:
        if view.index is not None:
            if self._begin is None:
                # The scheduler looks its first timestep up, and has made one step since then.
                self._begin = max(view.index - self.step - 1, 0) if self._began_uncounted else 0
            return view.index - self._begin
        # Diffusion forcing steps copies of the scheduler, one for each frame: then only the loop moves on.
        if view.counted:
            return view.counted
        if view.current is not None and self._current is not None and not self._current(view.current):
            return self.step + 1
        return self.step

    # -------------------------------------------------------------------------------------------- steps from timesteps
    def distance(self, reading: TimeReading) -> float | None:
        """How far on ``reading`` lies from the present step; 0 if it is the same one, None if it lies back."""
        if self._reading is None or reading.values == self._reading.values:
            return 0.0
        if reading.kind != "timestep":
            return None if reading.values in self._history else 1.0
        direction = _direction(self._reading.values, reading.values)
        if self._direction and direction == -self._direction:
            return None
        return max(abs(new - old) for new, old in zip(reading.values, self._reading.values, strict=False))

    def read(self, reading: TimeReading) -> None:
        """Take over what a call's inputs tell; a new value is the next step."""
        if self._reading is None:
            self._history = [reading.values]
        elif reading.values != self._reading.values:
            self._direction = _direction(self._reading.values, reading.values) or self._direction
            self._history.append(reading.values)
            self.move(self.step + 1)
        self._reading = reading

    def turned_at_once(self, reading: TimeReading) -> bool:
        """Whether ``reading`` falls behind the only move so far, which rose: then that was the beginning of a video."""
        if self.step != 1 or self.distance(reading) is not None:
            return False
        return self._history[0][0] < reading.values[0] < self._history[1][0]

    def learn_timestep(self, view: SchedulerView | None, read: Callable[[], TimeReading]) -> None:
        """The timestep of a step that somebody else told: from the schedule, which is read once, or by ``read``."""
        if view is not None and self._timesteps is not None:
            if self._schedule is None:
                self._schedule = [float(value) for value in view.timesteps]
            self._timestep = self._schedule[min((self._begin or 0) + self.step, len(self._schedule) - 1)]
        else:
            self._timestep = next(iter(read().values), None)

    @property
    def last_reading(self) -> TimeReading | None:
        return self._reading

    # ----------------------------------------------------------------------------------------------------------- calls
    def note(self, sparse: bool, reason: str) -> None:
        """A call ran, sparse or dense for a reason."""
        self.sparse_calls += sparse
        if sparse and self.first_sparse_step is None:
            self.first_sparse_step = self.step
        if not sparse:
            self.dense_reasons[reason] += 1

    def move(self, step: int) -> None:
        """Make ``step`` the present one."""
        if step != self.step:
            self._usual_calls |= self._calls
            self._calls.clear()
            self.step = step

    def expects(self, caller: Any) -> bool:
        """Whether ``caller`` has made fewer calls in this step than in its steps before (True in the first)."""
        return not self._usual_calls[caller] or self._calls[caller] < self._usual_calls[caller]

    def branch(self, caller: Any, name: Hashable) -> Hashable:
        """The branch of the next call of ``caller`` (a layer, or a whole model) in this step."""
        number = self._calls[caller, name]
        self._calls[caller, name] += 1
        self._calls[caller] += 1
        branch = number if name is None else (name, number)
        self._branches.setdefault(branch, len(self._branches))
        return branch

    def standing(self, branch: Hashable, source: str) -> Standing:
        """Where a call of ``branch`` stands now."""
        value, progress = self._timestep, None
        if self._reading is not None and self._reading.kind == "timestep" and self._reading.values:
            value = self._reading.values[0]
            progress = _progress(self._history[0], self._reading.values)
        return Standing(
            request=self.label,
            video=self.video,
            step=self.step,
            num_steps=self.num_steps,
            branch=branch,
            context=self._branches.get(branch, 0),
            source=source,
            timestep=value,
            progress=progress,
            estimated_steps=None if self.num_steps is not None else self._estimated_steps(),
        )

    def _estimated_steps(self) -> int | None:
        if self._reading is None or self._reading.kind != "timestep":
            return None
        return estimated_steps([values[0] for values in self._history[:3]])


def estimated_steps(timesteps: list[float]) -> int | None:
    """The number of steps of a flow schedule from its first three timesteps; None where they are not of one.

    Of N steps, step k has the noise level u = 1 - k/N, shifted by any factor s to x = s u / (1 + (s - 1) u). Then
    1/x - 1 = k / (N - k) / s, and the ratio of the second to the first, 2 (N - 1) / (N - 2), knows no s.
    """
    if len(timesteps) < 3:
        return None
    levels = [value / (_LARGE_RANGE if timesteps[0] > _SMALL_RANGE else _SMALL_RANGE) for value in timesteps]
    if not 0.98 <= levels[0] <= 1.0 or not levels[0] > levels[1] > levels[2] > 0.0:
        return None
    first, second = (1.0 / level - 1.0 / levels[0] for level in levels[1:])
    ratio = second / first
    if ratio <= 2.0:
        return None
    return max(3, round(2.0 * (ratio - 1.0) / (ratio - 2.0)))


def _direction(before: tuple[float, ...], after: tuple[float, ...]) -> int:
    """+1 or -1: the way in which the first value that changed moved; 0 if none did."""
    for old, new in zip(before, after, strict=False):
        if old != new:
            return 1 if new > old else -1
    return 0


def _progress(first: tuple[float, ...], now: tuple[float, ...]) -> float:
    """How far the timestep has moved, as a fraction of its range ([0, 1000], or [0, 1] where it never exceeds 1)."""
    largest = max(abs(first[0]), abs(now[0]))
    moved = abs(now[0] - first[0]) / (_LARGE_RANGE if largest > _SMALL_RANGE else _SMALL_RANGE)
    return min(moved, 1.0) if math.isfinite(moved) else 1.0
