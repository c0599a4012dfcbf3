"""Runs units within a budget of time, in worker processes that may crash or hang, and collects their records."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.units import Unit

__all__ = ["Order", "Outcome", "supervise"]

ROOT = Path(__file__).resolve().parent.parent.parent
POLL_SECONDS = 0.1
GRACE_SECONDS = 25.0  # beyond the budget, for the unit that is running when it ends
SLACK = 2.5  # a unit that takes this much longer than estimated hangs,
LEAST_SECONDS = 60.0  # but none before this


@dataclass(frozen=True)
class Order:
    """What a worker is told. budget: seconds for everything. events: a file that does not exist yet. command: starts a
    worker."""

    device: str
    repeats: int
    rehearsal: bool
    budget: float
    events: Path
    command: tuple[str, ...] = (sys.executable, "-m", "bench.gpu.worker")


@dataclass
class Outcome:
    """What was found. records: unit name -> record with its status."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    timing: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        return [name for name, record in self.records.items() if record["status"] == "failed"]


def supervise(units: Sequence[Unit], order: Order, notify: Callable[[str, dict[str, Any]], None]) -> Outcome:
    """Run ``units``; ``notify`` is called with every record as it arrives."""
    begin = time.monotonic()
    outcome = Outcome()

    def left() -> float:
        return order.budget - (time.monotonic() - begin)

    def record(name: str, what: dict[str, Any]) -> None:
        outcome.records[name] = what
        notify(name, what)

    while missing := [unit for unit in units if unit.name not in outcome.records]:
        if left() <= 0:
            for unit in missing:
                record(unit.name, {"status": "not measured", "reason": "the budget of time was spent"})
            break
        _Worker(missing, order, outcome, record, left).run()
    outcome.seconds = time.monotonic() - begin
    return outcome


class _Worker:
    """One worker process and the units that it still has to do; units that no longer fit end it."""

    def __init__(
        self,
        units: Sequence[Unit],
        order: Order,
        outcome: Outcome,
        record: Callable[[str, dict[str, Any]], None],
        left: Callable[[], float],
    ) -> None:
        self.units = {unit.name: unit for unit in units}
        self.order, self.outcome, self.record, self.left = order, outcome, record, left
        self.running: Unit | None = None
        self.started = False
        self.deadline = time.monotonic() + 120.0  # until the first unit starts
        self.read = 0

    def run(self) -> None:
        """Until all units are done, or one of them ended the process."""
        self.order.events.write_text("")
        told = {"device": self.order.device, "repeats": self.order.repeats, "rehearsal": self.order.rehearsal}
        told |= {"units": list(self.units), "events": str(self.order.events), "budget": self.left()}
        process = subprocess.Popen(
            self.order.command, stdin=subprocess.PIPE, cwd=ROOT, text=True, start_new_session=True
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.close()
        try:
            while process.poll() is None and not self._is_over():
                time.sleep(POLL_SECONDS)
                self._read_events()
        finally:
            if process.poll() is None:
                # Its own group, with the compilers that it started.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._read_events()
        self._explain(process.returncode)

    def _is_over(self) -> bool:
        """Whether the unit that runs, or the start of the process, takes too long."""
        return time.monotonic() > self.deadline

    def _read_events(self) -> None:
        lines = self.order.events.read_text().splitlines(keepends=True)
        for line in lines[self.read :]:
            if not line.endswith("\n"):
                return  # still being written
            self.read += 1
            event = json.loads(line)
            self.started = True
            if event["event"] == "environment":
                self.outcome.environment = event["environment"]
                self.outcome.timing = event["timing"]
            elif event["event"] == "start":
                self.running = self.units[event["unit"]]
                # A rehearsal may be interpreted, which takes as long as it takes.
                limit = math.inf if self.order.rehearsal else max(SLACK * self.running.seconds, LEAST_SECONDS)
                room = min(limit, self.left() + GRACE_SECONDS)
                self.deadline = time.monotonic() + room
            else:
                self.running = None
                self.record(event["unit"], event["record"])
                self.deadline = time.monotonic() + 30.0

    def _explain(self, returncode: int) -> None:
        """A record for the unit that ended the process; for all, where it never got to work."""
        too_long = returncode == -signal.SIGKILL and self._is_over()
        error = "took too long and was ended" if too_long else f"ended its process with exit code {returncode}"
        if not self.started:
            for name in self.units:
                self.record(name, {"status": "failed", "error": f"the worker did not start: it {error}"})
        elif self.running is not None and too_long and self.left() <= 0:
            self.record(self.running.name, {"status": "not measured", "reason": "the budget ended while it ran"})
        elif self.running is not None:
            self.record(self.running.name, {"status": "failed", "error": error})
