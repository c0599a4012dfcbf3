"""How far a comparison is: phases and steps as values, and two ways to show them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["PHASES", "Progress", "Tell", "shown_progress"]

# In their order. The first two compile, the next two are timed, the last is made only where it is asked for.
PHASES = ("compiling the dense graph", "compiling the sparse graph", "dense video", "sparse video", "attention maps")

# Where there is no terminal, seconds between two lines of one phase.
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Progress:
    """Something happened: ``step`` of ``steps`` in ``phase`` (one of PHASES) is done; ``steps`` is 0 if unknown.

    left: an estimate of the seconds that all phases still take; None while there is nothing to estimate from.
    """

    phase: str
    step: int
    steps: int
    left: float | None = None


Tell = Callable[[Progress], None]


class shown_progress:
    """A context manager that yields a ``Tell``: bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Tell:
        if not self._console.is_terminal:
            return self._line
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, TextColumn("{task.fields[left]}"), console=self._console)
        self._bars.start()
        return self._bar

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _bar(self, progress: Progress) -> None:
        assert self._bars is not None
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, total=None, left="")
        task = self._tasks[progress.phase]
        left = "" if not progress.left else f"{_seconds(progress.left)} left"
        self._bars.update(task, completed=progress.step, total=progress.steps or None, left=left)

    def _line(self, progress: Progress) -> None:
        now = time.monotonic()
        done = bool(progress.steps) and progress.step >= progress.steps
        if not done and now - self._said.get(progress.phase, -SECONDS_BETWEEN_LINES) < SECONDS_BETWEEN_LINES:
            return
        self._said[progress.phase] = now
        text = progress.phase if not progress.step else f"{progress.phase}: step {progress.step} of {progress.steps}"
        left = "" if not progress.left else f", {_seconds(progress.left)} left"
        self._console.print(text + left, highlight=False, soft_wrap=True)


def _seconds(number: float) -> str:
    return f"about {number:.0f} s" if number < 100 else f"about {number / 60:.0f} min"
