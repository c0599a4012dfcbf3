"""Which request a call belongs to, and the step that it is in: the best source that tells.

1. what the caller says (``svg2_compile.denoising``);
2. the scheduler of the pipeline that makes the call, as it is now;
3. the timestep among the inputs: the sequence that it continues. One that goes back opens another sequence, and never
   resets one that is under way: two loops may take turns.

A request never touches another's state. A sequence that is not called any more while another goes on is over.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from svg2_compile.runtime.pipelines import Same, SchedulerView
from svg2_compile.runtime.request import Request
from svg2_compile.runtime.standing import Said
from svg2_compile.runtime.time_reader import TimeReading

__all__ = ["Requests"]

# A sequence of timesteps is over when another has made this many steps without a call of it.
STEPS_WITHOUT_A_CALL = 2


class Requests:
    """The open requests of a session.

    Args:
        over: a method, called with every request whose video is over, or that was given up.
    """

    def __init__(self, over: Callable[[Request], None]) -> None:
        # Held weakly: whoever holds the requests is to be freed at once with its centroids, not when cycles are.
        self._over = weakref.WeakMethod(over)
        self._open: dict[Hashable, Request] = {}
        self._videos = itertools.count()
        self._sequences = itertools.count()
        # By identity. An id is given anew when its object is gone, so that the object is remembered beside it.
        self._scheduler_numbers: dict[int, tuple[Same, int]] = {}
        self._next_scheduler = itertools.count()
        self._calls = 0

    def open(self) -> list[Request]:
        """Those that are under way, as far as is known."""
        return list(self._open.values())

    def close(self, request: Request) -> None:
        """The video of ``request`` is over, or given up."""
        if self._open.get(request.key) is request:
            del self._open[request.key]
        over = self._over()
        if over is not None:
            over(request)

    def clear(self) -> None:
        """Close all."""
        for request in self.open():
            self.close(request)

    def locate(
        self, said: Said, view: SchedulerView | None, read: Callable[[], TimeReading], caller: Any
    ) -> tuple[Request, str] | None:
        """The request of a call, moved to the step of the call, and who told the step; None if nobody tells.

        Args:
            said: by the caller.
            view: the scheduler of the pipeline that makes the call, if there is one.
            read: reads the timestep; called only where nobody else tells.
            caller: the layer or model that is called.
        """
        self._calls += 1
        found = self._locate(said, view, read, caller)
        if found is not None:
            request, _ = found
            request.used = self._calls
            if said.num_steps is not None:
                request.num_steps = said.num_steps
        return found

    def _locate(
        self, said: Said, view: SchedulerView | None, read: Callable[[], TimeReading], caller: Any
    ) -> tuple[Request, str] | None:
        key = self._key(said, view)
        if said.step is not None:
            return self._at_step(key if key is not None else ("said", None), said.step), "context"
        if view is not None and view.tells and key is not None:
            return self._following(key, view), "scheduler"
        reading = read()
        if not reading.values:
            return None
        if said.request is not None:
            return self._reading_of(key, reading), reading.kind
        return self._sequence(reading, caller), reading.kind

    def _key(self, said: Said, view: SchedulerView | None) -> Hashable:
        if said.request is not None:
            return "said", said.request
        if view is None:
            return None
        same, number = self._scheduler_numbers.get(id(view.scheduler), (None, 0))
        if same is None or not same(view.scheduler):
            self._scheduler_numbers = {key: known for key, known in self._scheduler_numbers.items() if known[0].alive}
            number = next(self._next_scheduler)
            self._scheduler_numbers[id(view.scheduler)] = Same(view.scheduler), number
        return "scheduler", number

    def _begin(self, key: Hashable, owner: Any = None) -> Request:
        """Another video of the request ``key``."""
        previous = self._open.get(key)
        if previous is not None:
            self.close(previous)
        self._close_orphans()
        kind, name = key if isinstance(key, tuple) else ("", key)
        label = str(name) if kind == "said" and name is not None else f"{kind} {name}"
        request = self._open[key] = Request(key, label, next(self._videos))
        request.owner = None if owner is None else weakref.ref(owner)
        return request

    def _close_orphans(self) -> None:
        """Requests whose scheduler is gone will never be called again."""
        for request in self.open():
            if request.owner is not None and request.owner() is None:
                self.close(request)

    def _at_step(self, key: Hashable, step: int) -> Request:
        request = self._open.get(key)
        if request is None or step < request.step:
            request = self._begin(key)
        request.move(step)
        return request

    def _following(self, key: Hashable, view: SchedulerView) -> Request:
        request = self._open.get(key)
        if request is None or not request.follow(view):
            request = self._begin(key, view.scheduler)
            request.follow(view)
        return request

    def _reading_of(self, key: Hashable, reading: TimeReading) -> Request:
        request = self._open.get(key)
        if request is None or request.distance(reading) is None:
            request = self._begin(key)
        request.read(reading)
        return request

    # ------------------------------------------------------------------------------------------ sequences of timesteps
    def _sequence(self, reading: TimeReading, caller: Any) -> Request:
        candidates = [request for request in self.open() if self._is_sequence(request)]
        request = self._continued(candidates, reading, caller)
        if request is None:
            request = self._opened(candidates, reading)
        before = request.step
        request.read(reading)
        if request.step != before:
            self._close_left_behind(request)
        return request

    @staticmethod
    def _is_sequence(request: Request) -> bool:
        return isinstance(request.key, tuple) and request.key[0] == "sequence"

    def _continued(self, candidates: list[Request], reading: TimeReading, caller: Any) -> Request | None:
        """The sequence that a call continues; None if it goes back in all of them.

        One that stands at this timestep and expects another call of ``caller`` in it comes first; then the one that is
        nearest of those that go on to it; then one that stands at it, with a branch that it did not have before.
        """
        distances = {request: request.distance(reading) for request in candidates}
        here = [request for request in candidates if distances[request] == 0.0]
        expecting = [request for request in here if request.expects(caller)]
        if expecting:
            return max(expecting, key=lambda request: request.used)
        ahead = [(distance, -request.used, request) for request, distance in distances.items() if distance]
        if ahead:
            return min(ahead, key=lambda entry: entry[:2])[2]
        return max(here, key=lambda request: request.used, default=None)

    def _opened(self, candidates: list[Request], reading: TimeReading) -> Request:
        for other in candidates:
            # A single call at some timestep, to warm up, and then a video: its first step seemed to be the second.
            if other.turned_at_once(reading) and other.last_reading is not None:
                first = other.last_reading
                self.close(other)
                request = self._begin(("sequence", next(self._sequences)))
                request.read(first)
                return request
        return self._begin(("sequence", next(self._sequences)))

    def _close_left_behind(self, active: Request) -> None:
        """``active`` has made a step: what was not called since it made the one before the last is over."""
        active.step_marks.append(self._calls)
        if len(active.step_marks) < STEPS_WITHOUT_A_CALL:
            return
        for other in self.open():
            if other is not active and self._is_sequence(other) and other.used < active.step_marks[0]:
                self.close(other)
