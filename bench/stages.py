"""Where the time of a rewritten attention goes on a CPU: what reusing a map, resting clusters or a guard can be worth,
and what first-order compensation adds.

    python -m bench.stages          JSON in bench/results/stages.json

First-order compensation at 10 % density, float32, from the centroids of the step before. A map of the step before would
spare "select" and the error half of "estimate"; clusters that rest would spare "k-means"; "sampled error" is what a
measured error adds. The stages are timed in turn, so that a slow moment of the machine hits all of them. "Added" is the
whole over that with SVG-EAR's compensation and routing at the same density, call by call in turn: the median of the
ratios of pairs. All of it on one thread: two of them on a shared machine differ by more than what is asked for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench.clustered_inputs import clustered_inputs
from bench.common import require_close, write_results
from bench.quality.results import STAGES
from bench.quality.tables_stages import added_table, stages_table
from bench.rewritten import Rewritten, Settings, make_inputs
from bench.shape import default_shape
from svg2_compile.kernels import ops
from svg2_compile.passes.error_guard import ROWS

DENSITY, HEADS = 0.10, 2
ADDED_TO = [(tokens, dim) for dim in (64, 128) for tokens in (4096, 16_384, 32_768)]


def measure(num_tokens: int, head_dim: int, repeats: int) -> dict[str, Any]:
    """Median seconds and shares of the stages at one length."""
    shape = default_shape("stages", HEADS, num_tokens, head_dim, 1.2, torch.float32)
    inputs = make_inputs(shape, clustered_inputs(shape))
    everything = Rewritten(shape, inputs, Settings(1.0, first_order=True))
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    error = require_close("everything selected", everything.run(), dense, 1e-4)
    call = Rewritten(shape, inputs, Settings(DENSITY, first_order=True))

    def sampled_error() -> None:
        orders = (call.q_order, call.q_offsets, call.k_offsets)
        tokens = (inputs.query, call.k_permuted, call.v_permuted, call.out)
        ops.sampled_error(*tokens, *orders, shape.scale, ROWS)

    stages = {**call.stages, "sampled error": sampled_error}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, stage in stages.items():
            begin = time.perf_counter()
            stage()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = sum(value for name, value in medians.items() if name != "sampled error")
    return {
        "num_tokens": num_tokens,
        "head_dim": head_dim,
        "whole_ms": round(1e3 * whole, 1),
        "ms": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "slowest_over_fastest": {name: round(max(v) / min(v), 2) for name, v in seconds.items()},
        "share": {name: round(value / whole, 4) for name, value in medians.items()},
        "gate_error": error,
    }


def added(num_tokens: int, head_dim: int, density: float, repeats: int) -> dict[str, Any]:
    """What the default takes over SVG-EAR at the same density, as a part of the latter."""
    shape = default_shape("added", HEADS, num_tokens, head_dim, 1.2, torch.float32)
    inputs = make_inputs(shape, clustered_inputs(shape))
    calls = [
        Rewritten(shape, inputs, Settings(density, compensation=True, by_error=True)),
        Rewritten(shape, inputs, Settings(density, first_order=True)),
    ]
    pairs = []
    for _ in range(repeats):
        times = []
        for call in calls:
            begin = time.perf_counter()
            call.run()
            times.append(time.perf_counter() - begin)
        pairs.append(times)
    ratios = sorted(after / before - 1 for before, after in pairs)
    return {
        "num_tokens": num_tokens,
        "head_dim": head_dim,
        "density": density,
        "before_ms": round(1e3 * statistics.median(before for before, _ in pairs), 1),
        "after_ms": round(1e3 * statistics.median(after for _, after in pairs), 1),
        "added": round(statistics.median(ratios), 4),
        "middle_half": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16_384])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        results = [measure(tokens, 64, arguments.repeats) for tokens in arguments.tokens]
        of_whole = [added(*shape, density, arguments.repeats) for shape in ADDED_TO for density in (0.10, 0.25)]
    about = {"density": DENSITY, "heads": HEADS, "added": of_whole}
    print(stages_table({"results": results, **about}))
    print(added_table({"results": results, **about}))
    print(write_results(STAGES, results, **about))


if __name__ == "__main__":
    main()
