"""Runs units one after another in a process of its own, so that a crash or a hang of one costs no other.

Its standard input is one line of JSON: {"units": [...], "device": ..., "repeats": ..., "rehearsal": ..., "events":
path, "budget": seconds}. It appends one line of JSON to ``events`` when a unit starts and when it ends. A unit that
would not fit into the rest of the budget is not started.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.context import Context
from bench.gpu.machine import TIMING, Machine
from bench.gpu.units import UNITS, run_unit
from svg2_compile.kernels.ops import use_implementation

__all__ = ["POISONED", "main"]

POISONED = 3  # exit code: the device refuses all further work of this process


def main() -> int:
    order = json.loads(sys.stdin.readline())
    events = Path(order["events"])

    def tell(event: dict[str, Any]) -> None:
        with events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    implementation = contextlib.nullcontext() if not order["rehearsal"] else rehearsed_implementation()
    with torch.no_grad(), implementation:
        return run_units(order, tell)


def rehearsed_implementation() -> contextlib.AbstractContextManager[None]:
    """The CPU's own operators, or the Triton kernels, interpreted."""
    torch.set_num_threads(1)  # tiny matrices: threads that wait for each other cost more than they do
    if os.environ.get("TRITON_INTERPRET") != "1":
        return use_implementation("cpu")
    from tests.interpreter import bfloat16

    bfloat16.install()
    return use_implementation("triton")


def run_units(order: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Run what was ordered. Returns the exit code."""
    end = time.monotonic() + order["budget"]
    machine = Machine(torch.device(order["device"]))
    tell({"event": "environment", "environment": machine.environment(), "timing": TIMING})
    context = Context(machine, order["repeats"], order["rehearsal"])
    for name in order["units"]:
        unit, begin = UNITS[name], time.monotonic()
        tell({"event": "start", "unit": name})
        if end - begin < unit.seconds:
            reason = f"needs up to {unit.seconds:.0f} s, and {max(end - begin, 0):.0f} s of the budget are left"
            record: dict[str, Any] = {"status": "not measured", "reason": reason}
        else:
            record = run_unit(unit, context)
        tell({"event": "end", "unit": name, "record": {**record, "seconds": round(time.monotonic() - begin, 1)}})
        if record["status"] == "failed" and not usable(machine):
            return POISONED
    return 0


def usable(machine: Machine) -> bool:
    """Whether the device still computes: after an illegal access no call of the process succeeds."""
    try:
        torch.ones(2, device=machine.device).sum().item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
