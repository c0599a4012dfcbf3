"""Everything about speed on a GPU, in one command, in under nine minutes on an H200.

    python -m bench.gpu                  correctness gate, then all parts; writes bench/results/<device>-*.json
    python -m bench.gpu --quick          the main shape alone, few repeats; writes only with --out
    python -m bench.gpu --only kmeans    the units whose name contains "kmeans", after the gate
    python -m bench.gpu --rehearse       the same code with tiny shapes on the CPU; writes only with --out
    TRITON_INTERPRET=1 python -m bench.gpu --rehearse --budget 3000       and with the Triton kernels, interpreted

Units run in order of importance. What does not fit into the budget, or cannot run here, is recorded as "not measured"
with its reason. A unit that fails is recorded with its error, the others still run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.clustered_inputs import clustered_inputs
from bench.gpu.summary import summarise
from bench.gpu.supervisor import Order, Outcome, supervise
from bench.gpu.units import RESULTS, UNITS, select_units

BUDGET_SECONDS = 500.0
REPEATS = 7


def parse(arguments: list[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=summary)
    parser.add_argument("--quick", action="store_true", help="the main shape alone, few repeats")
    parser.add_argument("--only", metavar="NAME", help="units whose name contains NAME")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, metavar="S", help="seconds (default 500)")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed runs of each function (default 7)")
    return parser.parse_args(arguments)


def write(outcome: Outcome, folder: Path, rehearsal: bool) -> list[Path]:
    """One file per result with the records so far; those of nothing are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in RESULTS:
        records = {name: record for name, record in outcome.records.items() if UNITS[name].result == result}
        if not records:
            continue
        document = {
            "benchmark": f"gpu {result}",
            "rehearsal": rehearsal,
            "environment": outcome.environment,
            "timing": outcome.timing,
            "inputs": clustered_inputs.__doc__,
            "results": [{"unit": name, **record} for name, record in records.items()],
        }
        path = folder / f"{outcome.environment.get('slug', 'unknown')}-{result.replace('_', '-')}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; --rehearse runs the same code with tiny shapes on the CPU", file=sys.stderr)
        return 2
    try:
        units = select_units(options.only, options.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder = options.out or (None if options.rehearse or options.quick else common.RESULTS)
    repeats = options.repeats or (1 if options.rehearse else 3 if options.quick else REPEATS)
    with tempfile.TemporaryDirectory() as scratch:
        order = Order(
            device="cpu" if options.rehearse else "cuda",
            repeats=repeats,
            rehearsal=options.rehearse,
            budget=options.budget,
            events=Path(scratch) / "events.jsonl",
        )
        outcome = supervise(units, order, _print_record)
        # A rehearsal writes too, to know that it can.
        paths = write(outcome, folder or Path(scratch), options.rehearse)
    print(summarise(outcome.records))
    if options.rehearse:
        print("\nThis was a rehearsal: tiny shapes on the CPU. Its times say nothing.")
    print(f"\n{outcome.seconds:.0f} s; {len(outcome.failed)} of {len(units)} units failed")
    for path in paths if folder else []:
        print(path)
    return 1 if outcome.failed else 0


def _print_record(name: str, record: dict[str, Any]) -> None:
    note = record.get("reason") or record.get("error") or ""
    print(f"{name}: {record['status']} {note}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
