"""Rewritten attention against dense attention on the CPU: speed, memory, share of each stage.

    python -m bench.cpu_attention            every shape (about 15 minutes on two cores); JSON and plot
    python -m bench.cpu_attention --quick    one small shape per dtype, nothing written

Dense is scaled_dot_product_attention on the same query, key and value. "attention" is svg2::block_sparse_attention
alone; "everything" adds k-means (two iterations from warm centroids, for queries and for keys), selection, ordering,
permutation and un-permutation. A shape is timed only after its result was compared with exact attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.common import measure, peak_memory_growth, require_close, write_results
from bench.rewritten_attention import Case, RewrittenAttention, clustered_inputs

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}  # of the largest value; bfloat16: two roundings
DENSITIES = (0.25, 0.125)
SAMPLED_ROWS = 64
MEMORY_CASES = [Case(n, 64, 4 if n <= 16384 else 2, torch.float32, 0.25) for n in (4096, 8192, 16384, 32768)]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def all_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            for num_tokens in (4096, 8192, 16384, 32768):
                for density in DENSITIES:
                    yield Case(num_tokens, head_dim, 4 if num_tokens <= 16384 else 2, dtype, density)


def density_cases() -> Iterator[Case]:
    for density in (0.0625, 0.5, 1.0):
        yield Case(16384, 64, 4, torch.float32, density)


def quick_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(4096, 64, 2, dtype, 0.25)


def check(case: Case) -> dict[str, float]:
    """The gate: sampled rows of this shape against float64; every cluster kept against dense, at up to 2k tokens."""
    small = Case(min(case.num_tokens, 2048) - 7, case.head_dim, 1, case.dtype, 1.0)
    inputs = clustered_inputs(small)
    everything = RewrittenAttention(small, *inputs).out
    exact = dense(*(x.double() for x in inputs))
    attention = RewrittenAttention(case, *clustered_inputs(case))
    rows = torch.randperm(case.num_tokens, generator=torch.Generator().manual_seed(1))[:SAMPLED_ROWS]
    sampled = attention.out_permuted[0][:, rows]
    tolerance = TOLERANCE[case.dtype]
    return {
        "error_all_kept": require_close(f"{case} with every cluster kept", everything, exact, tolerance),
        "error_sampled_rows": require_close(f"{case}", sampled, attention.exact_rows(rows), tolerance),
    }


def prepare_dense(case: Case) -> Callable[[], object]:
    inputs = clustered_inputs(case)
    return lambda: dense(*inputs)


def prepare_rewritten(case: Case) -> Callable[[], object]:
    inputs = clustered_inputs(case)
    # Start the thread pools on something small: they are not the memory of this shape.
    RewrittenAttention(Case(512, case.head_dim, 1, case.dtype, case.density), *(x[:, :1, :512] for x in inputs))
    return lambda: RewrittenAttention(case, *inputs)


def memory_of(case: Case) -> dict[str, float]:
    """MiB by which one call raises the peak resident set, dense and rewritten, each in a process of its own."""
    return {
        "peak_growth_dense_mib": round(peak_memory_growth(prepare_dense, case), 1),
        "peak_growth_rewritten_mib": round(peak_memory_growth(prepare_rewritten, case), 1),
    }


def run_case(case: Case, repeats: int, with_memory: bool) -> dict[str, Any]:
    errors = check(case)
    query, key, value = clustered_inputs(case)
    rewritten = RewrittenAttention(case, query, key, value)
    timings = measure(
        {"dense": lambda: dense(query, key, value), "everything": rewritten.run, **rewritten.stages}, repeats
    )
    dense_ms, attention_ms = timings["dense"].median_ms, timings["attend"].median_ms
    total_ms = timings["everything"].median_ms
    density = rewritten.achieved_density()
    result: dict[str, Any] = {
        "num_tokens": case.num_tokens,
        "head_dim": case.head_dim,
        "num_heads": case.num_heads,
        "dtype": str(case.dtype).removeprefix("torch."),
        "density": round(density, 4),
        "requested_density": case.density,
        "speedup_attention": round(dense_ms / attention_ms, 2),
        "speedup_everything": round(dense_ms / total_ms, 2),
        "speedup_limit": round(1 / density, 2),
        "dense": timings["dense"].to_json(),
        "attention": timings["attend"].to_json(),
        "everything": timings["everything"].to_json(),
        "stage_share": {name: round(timings[name].median_ms / total_ms, 4) for name in rewritten.stages},
        **{name: float(f"{error:.2e}") for name, error in errors.items()},
    }
    if with_memory:
        result |= memory_of(case)
    return result


def print_result(result: dict[str, Any]) -> None:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result["stage_share"].items())
    print(
        f"N {result['num_tokens']:6d}  D {result['head_dim']:3d}  {result['dtype']:8s}  "
        f"density {result['density']:.3f}  "
        f"dense {result['dense']['median_ms']:9.1f} ms  attention {result['speedup_attention']:.2f}x  "
        f"everything {result['speedup_everything']:.2f}x  (limit {result['speedup_limit']:.2f}x)  "
        f"spread {result['dense']['spread']:.0%}/{result['everything']['spread']:.0%}\n    {shares}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small shape per dtype; writes nothing")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each function (default 7)")
    options = parser.parse_args()
    cases = quick_cases() if options.quick else (*all_cases(), *density_cases())
    results = []
    with torch.inference_mode():
        for case in cases:
            # Memory depends on neither dtype nor density in an interesting way: one series tells how it scales.
            with_memory = not options.quick and case in MEMORY_CASES
            results.append(run_case(case, 3 if options.quick else options.repeats, with_memory))
            print_result(results[-1])
    if not options.quick:
        from bench.plots import plot_cpu_attention

        print(write_results("cpu_attention", results, generator=clustered_inputs.__doc__))
        print(plot_cpu_attention(results))


if __name__ == "__main__":
    main()
