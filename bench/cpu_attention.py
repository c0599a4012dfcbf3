"""Rewritten attention against dense attention on the CPU: speed, memory, share of each stage.

    python -m bench.cpu_attention            every shape (about 15 minutes on two cores); JSON and plot
    python -m bench.cpu_attention --quick    one small shape per dtype, nothing written
    python -m bench.cpu_attention --loaded   two shapes, quiet and with two other busy processes; JSON of its own

Dense is scaled_dot_product_attention on the same query, key and value. "attention" is svg2::block_sparse_attention
alone; "everything" adds k-means (a step's default iterations, from warm centroids), selection, ordering, permutation
and un-permutation. As SVG2 publishes it, with the centroid compensation and error routing of SVG-EAR, and with the
default: first-order compensation and one budget for all heads. "flex" is FlexAttention with a mask of 128 x 128 blocks
of equal density, "sgemm" the machine's matrix product, "aten" the default without native code. All of them take turns
in one run. A shape is timed only after its results were compared with exact attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench.clustered_inputs import clustered_inputs
from bench.common import Timing, measure, peak_memory_growth, require_close, write_results
from bench.cpu_peers import busy_processes, flex_peer, sgemm, sgemm_gflops
from bench.rewritten import Inputs, Rewritten, Settings, make_inputs
from bench.shape import Shape, default_shape
from svg2_compile.kernels.ops import use_implementation

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}  # of the largest value; bfloat16: two roundings
SAMPLED_ROWS = 64
SPREAD = 2.4
VARIANTS = {
    "svg2": {},
    "centroid": {"compensation": True, "by_error": True},
    "default": {"first_order": True},
}


class Case(NamedTuple):
    """A self-attention at a fixed density."""

    shape: Shape
    density: float

    def settings(self, variant: str) -> Settings:
        return Settings(self.density, **VARIANTS[variant])


def case(num_tokens: int, head_dim: int, dtype: torch.dtype = torch.float32, density: float = 0.25) -> Case:
    num_heads = 4 if num_tokens <= 16384 else 2
    return Case(default_shape(f"{num_tokens}", num_heads, num_tokens, head_dim, SPREAD, dtype), density)


SERIES = [case(num_tokens, 64) for num_tokens in (4096, 8192, 16384, 32768)]
"""One series tells how memory scales: it depends on neither dtype nor density in an interesting way."""


def all_cases() -> Iterator[Case]:
    yield from SERIES
    for density in (0.0625, 0.1, 0.5, 1.0):
        yield case(16384, 64, density=density)
    for num_tokens in (16384, 32768):
        for density in (0.25, 0.1):
            yield case(num_tokens, 128, density=density)
    for head_dim in (64, 128):
        for density in (0.25, 0.1):
            yield case(16384, head_dim, torch.bfloat16, density)


def quick_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield case(4096, 64, dtype)


def dense(inputs: Inputs) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def prepare(chosen: Case) -> Inputs:
    return make_inputs(chosen.shape, clustered_inputs(chosen.shape))


def check(chosen: Case, variant: str, rewritten: Rewritten) -> dict[str, float]:
    """The gate: sampled rows of this shape against float64; every cluster kept against dense, at up to 2k tokens."""
    shape, tolerance = chosen.shape, TOLERANCE[chosen.shape.dtype]
    short = default_shape("short", 1, min(shape.num_tokens, 2048) - 7, shape.head_dim, SPREAD, shape.dtype)
    inputs = make_inputs(short, clustered_inputs(short))
    everything = Rewritten(short, inputs, Settings(1.0, **VARIANTS[variant])).out
    exact = dense(inputs._replace(query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double()))
    rows = torch.randperm(shape.num_tokens, generator=torch.Generator().manual_seed(1))[:SAMPLED_ROWS]
    what = f"{variant}, {chosen}"
    return {
        "error_all_kept": require_close(f"{what}, every cluster kept", everything, exact, tolerance),
        "error_sampled_rows": require_close(
            what, rewritten.out[0][:, rows].double(), rewritten.exact_rows(rows), tolerance
        ),
    }


def prepare_dense(chosen: Case) -> Callable[[], object]:
    inputs = prepare(chosen)
    return lambda: dense(inputs)


def prepare_rewritten(chosen: Case) -> Callable[[], object]:
    inputs = prepare(chosen)
    # Start the thread pools on something small: they are not the memory of this shape.
    small = default_shape("small", 1, 512, chosen.shape.head_dim, SPREAD, chosen.shape.dtype)
    Rewritten(small, make_inputs(small, clustered_inputs(small)), Settings(chosen.density))
    return lambda: Rewritten(chosen.shape, inputs, chosen.settings("default"))


def memory_of(chosen: Case) -> dict[str, float]:
    """MiB by which one call raises the peak resident set, dense and rewritten, each in a process of its own."""
    return {
        "peak_growth_dense_mib": round(peak_memory_growth(prepare_dense, chosen), 1),
        "peak_growth_rewritten_mib": round(peak_memory_growth(prepare_rewritten, chosen), 1),
    }


def run_case(chosen: Case, repeats: int, with_memory: bool) -> dict[str, Any]:
    """One shape: dense and both variants in turn, the default one also stage by stage."""
    inputs = prepare(chosen)
    variants = {name: Rewritten(chosen.shape, inputs, chosen.settings(name)) for name in VARIANTS}
    errors = {name: check(chosen, name, rewritten) for name, rewritten in variants.items()}
    functions: dict[str, Callable[[], object]] = {"dense": lambda: dense(inputs), "sgemm": sgemm()}
    if chosen.density < 1:
        functions["flex"] = flex_of(chosen, inputs)
    for name, rewritten in variants.items():
        functions |= {name: rewritten.run, f"{name} attention": rewritten.attend}
    stages = variants["default"].stages
    timings = measure({**functions, **{name: run for name, run in stages.items() if name != "attend"}}, repeats)
    timings["attend"] = timings["default attention"]
    dense_ms = timings["dense"].median_ms
    shape = chosen.shape
    result: dict[str, Any] = {
        "num_tokens": shape.num_tokens,
        "head_dim": shape.head_dim,
        "num_heads": shape.num_heads,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "num_q_clusters": shape.num_q_clusters,
        "num_k_clusters": shape.num_k_clusters,
        "requested_density": chosen.density,
        "dense": timings["dense"].to_json(),
        **rates(shape, timings),
        "stage_share": {name: round(timings[name].median_ms / timings["default"].median_ms, 4) for name in stages},
    }
    for name, rewritten in variants.items():
        density = float(rewritten.densities().mean())
        result[name] = {
            "density": round(density, 4),
            "speedup_attention": round(dense_ms / timings[f"{name} attention"].median_ms, 2),
            "speedup_everything": round(dense_ms / timings[name].median_ms, 2),
            "speedup_limit": round(1 / density, 2),
            "attention": timings[f"{name} attention"].to_json(),
            "everything": timings[name].to_json(),
            **{what: float(f"{error:.2e}") for what, error in errors[name].items()},
        }
    return result | (memory_of(chosen) if with_memory else {})


def flex_of(chosen: Case, inputs: Inputs) -> Callable[[], object]:
    return flex_peer(inputs.query, inputs.key, inputs.value, chosen.density, TOLERANCE[chosen.shape.dtype])


def rates(shape: Shape, timings: dict[str, Timing]) -> dict[str, Any]:
    """The machine's matrix product and dense attention in GFLOP/s, and FlexAttention."""
    dense_ms = timings["dense"].median_ms
    found: dict[str, Any] = {
        "sgemm_gflops": round(sgemm_gflops(timings["sgemm"].median_ms), 1),
        "dense_gflops": round(shape.flops() / dense_ms / 1e6, 1),
    }
    if "flex" in timings:
        found["flex"] = {"speedup": round(dense_ms / timings["flex"].median_ms, 2), **timings["flex"].to_json()}
    return found


LOADED_CASES = [case(8192, 64), case(16384, 64, density=0.1)]
BUSY = 2


def run_loaded(chosen: Case, repeats: int) -> dict[str, Any]:
    """One shape on the machine as it is, then with BUSY other processes: ratios to dense attention in each."""
    inputs = prepare(chosen)
    rewritten = Rewritten(chosen.shape, inputs, chosen.settings("default"))
    check(chosen, "default", rewritten)

    def by_aten() -> None:
        with use_implementation("cpu"):
            rewritten.run()

    functions: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(inputs),
        "everything": rewritten.run,
        "attention": rewritten.attend,
        "everything, aten": by_aten,
        "flex": flex_of(chosen, inputs),
        "sgemm": sgemm(),
    }
    result: dict[str, Any] = {
        "num_tokens": chosen.shape.num_tokens,
        "head_dim": chosen.shape.head_dim,
        "density": round(float(rewritten.densities().mean()), 4),
    }
    quiet = measure(functions, repeats)
    with busy_processes(BUSY):
        loaded = measure(functions, repeats)
    for name, timings in (("quiet", quiet), ("loaded", loaded)):
        ratios = {of: round(timings["dense"].median_ms / timing.median_ms, 2) for of, timing in timings.items()}
        result[name] = {
            "speedup": ratios,
            "sgemm_gflops": round(sgemm_gflops(timings["sgemm"].median_ms), 1),
            "times": {of: timing.to_json() for of, timing in timings.items()},
        }
        print(f"N {chosen.shape.num_tokens}  density {result['density']}  {name:6s} {ratios}", flush=True)
    return result


def print_result(result: dict[str, Any]) -> None:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result["stage_share"].items())
    print(
        f"N {result['num_tokens']:6d}  D {result['head_dim']:3d}  {result['dtype']:8s}  "
        f"dense {result['dense']['median_ms']:9.1f} ms, spread {result['dense']['spread']:.0%}  "
        f"{result['dense_gflops']} of sgemm's {result['sgemm_gflops']} GFLOP/s  "
        f"flex {result['flex']['speedup'] if 'flex' in result else '-'}x\n    {shares}"
    )
    for name in VARIANTS:
        of = result[name]
        print(
            f"    {name:8s} density {of['density']:.3f}  attention {of['speedup_attention']:.2f}x  everything "
            f"{of['speedup_everything']:.2f}x  (limit {of['speedup_limit']:.2f}x)  "
            f"spread {of['everything']['spread']:.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small shape per dtype; writes nothing")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each function (default 5)")
    parser.add_argument("--loaded", action="store_true", help="two shapes, quiet and beside two other busy processes")
    options = parser.parse_args()
    if options.loaded:
        with torch.inference_mode():
            results = [run_loaded(chosen, options.repeats) for chosen in LOADED_CASES]
        print(write_results("cpu_attention_loaded", results, busy_processes=BUSY, generator=clustered_inputs.__doc__))
        return
    cases = quick_cases() if options.quick else all_cases()
    results = []
    with torch.inference_mode():
        for chosen in cases:
            with_memory = not options.quick and chosen in SERIES
            results.append(run_case(chosen, 3 if options.quick else options.repeats, with_memory))
            print_result(results[-1])
    if not options.quick:
        from bench.plots import plot_cpu_attention

        print(write_results("cpu_attention", results, generator=clustered_inputs.__doc__))
        print(plot_cpu_attention(results))


if __name__ == "__main__":
    main()
