"""Everything that is measured, as units in order of importance, and what one of them leaves behind."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu.context import Context
from bench.gpu.part_attention import attention, flashinfer, flex
from bench.gpu.part_gate import gate
from bench.gpu.part_kmeans import kmeans
from bench.gpu.part_stages import stages
from bench.gpu.part_wan import wan_block
from bench.gpu.peers import NotMeasured

__all__ = ["RESULTS", "UNITS", "Unit", "run_unit", "select_units"]

# The result files; every unit belongs to one.
RESULTS = ("attention", "kmeans", "stages", "wan_block")


@dataclass(frozen=True)
class Unit:
    """One measurement. seconds: what it should need on an H200 at the most, compilation included (an estimate)."""

    name: str
    result: str
    seconds: float
    run: Callable[[Context], dict[str, Any]]


def _units() -> tuple[Unit, ...]:
    def unit(kind: Callable[..., dict[str, Any]], shape: str, result: str, seconds: float) -> Unit:
        return Unit(f"{kind.__name__} {shape}", result, seconds, functools.partial(kind, name=shape))

    wan, hunyuan, small, ltx = "wan2.1-14b-720p", "hunyuanvideo-720p", "wan2.1-1.3b-480p", "ltx-8k"
    return (
        Unit("gate", "attention", 60, gate),
        unit(attention, wan, "attention", 45),
        unit(stages, wan, "stages", 35),
        unit(kmeans, wan, "kmeans", 25),
        unit(wan_block, wan, "wan_block", 120),
        unit(flex, wan, "attention", 45),
        unit(attention, hunyuan, "attention", 40),
        unit(stages, hunyuan, "stages", 30),
        unit(attention, ltx, "attention", 20),
        unit(stages, ltx, "stages", 15),
        unit(kmeans, ltx, "kmeans", 15),
        unit(flex, ltx, "attention", 30),
        unit(attention, small, "attention", 15),
        unit(stages, small, "stages", 15),
        unit(kmeans, hunyuan, "kmeans", 15),
        unit(flashinfer, wan, "attention", 60),
    )


UNITS = {unit.name: unit for unit in _units()}
# A first look in a minute or two: the shape that the goals are about.
QUICK = ("gate", "attention wan2.1-14b-720p", "stages wan2.1-14b-720p", "kmeans wan2.1-14b-720p")


def select_units(only: str | None, quick: bool) -> list[Unit]:
    """Those whose name contains ``only``; the gate comes first in any case. Raises ValueError where there is none."""
    chosen = [unit for name, unit in UNITS.items() if (not quick or name in QUICK) and (not only or only in name)]
    if not chosen:
        raise ValueError(f"--only {only!r} names nothing; valid: a part of {', '.join(UNITS)}")
    return chosen if chosen[0].name == "gate" else [UNITS["gate"], *chosen]


def run_unit(unit: Unit, context: Context) -> dict[str, Any]:
    """A record: what was measured, "not measured" with the reason, or "failed" with the error."""
    try:
        return {"status": "measured", **unit.run(context)}
    except NotMeasured as reason:
        return {"status": "not measured", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001  (recorded, printed, and the exit code says so: the others still run)
        trace = traceback.format_exc()
        print(trace, flush=True)
        return {
            "status": "failed",
            "error": f"{type(error).__name__}: {str(error)[:500]}",
            "traceback": trace.splitlines()[-12:],
        }
