"""What the passes add to compile time: a Wan transformer of 40 layers, whole and regional.

    python -m bench.compile_time            40 layers; JSON in bench/results/compile_time.json
    python -m bench.compile_time --quick    4 layers, nothing written

The layers are narrow (hidden size 128), which makes Inductor's own time as short as it gets: what the passes add weighs
least on real models. Inductor compiles without its on-disk caches.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import WanTransformer3DModel

import svg2_compile
from bench.common import require_close, write_results
from svg2_compile.codegen.inner_backend import compile_inner

# Every self-attention becomes sparse, and both graphs are compiled.
OPTIONS: dict[str, Any] = {"min_tokens": 0, "dense_steps": 1, "dense_layers": 0, "top_p": 1.0, "min_k_ratio": 1.0}


def model_and_inputs(layers: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=layers,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 32, 32),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "return_dict": False,
    }
    return model, inputs


def first_call_seconds(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """Seconds of a first call: tracing, compiling and one run."""
    begin = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    return time.perf_counter() - begin


def inductor_alone(layers: int, regional: bool) -> float:
    torch._dynamo.reset()
    model, inputs = model_and_inputs(layers)

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Any:
        return compile_inner(gm, examples, "inductor")

    if regional:
        model.compile_repeated_blocks(backend=backend)
    else:
        model.compile(backend=backend)
    return first_call_seconds(model, inputs)


def with_svg2(layers: int, regional: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    model, inputs = model_and_inputs(layers)
    with torch.no_grad():
        expected = model(**inputs)[0]
    with svg2_compile.enable(model, regional=regional, **OPTIONS) as enabled:
        dense_call = first_call_seconds(model, inputs)
        later = {**inputs, "timestep": torch.tensor([500])}
        sparse_call = first_call_seconds(model, later)
        with torch.no_grad():
            error = require_close("compiled model", model(**later)[0], eager(layers, later), 1e-3)
        report = enabled.report()
        compiled = [graph for program in enabled.session.programs for graph in (program.dense, program.sparse) if graph]
    assert expected.shape
    by_pass: dict[str, float] = {}
    for graph in report.graphs:
        for name, seconds in graph.pass_seconds.items():
            by_pass[name] = by_pass.get(name, 0.0) + seconds
    inner = sum(graph.compile_seconds or 0.0 for graph in compiled)
    return {
        "first_dense_call_s": round(dense_call, 2),
        "first_sparse_call_s": round(sparse_call, 2),
        "graphs_from_dynamo": len(report.graphs),
        "graphs_compiled": sum(graph.compiled for graph in compiled),
        "sparse_attentions": len(report.sparse_sites),
        "inductor_s": round(inner, 2),
        "passes_s": round(sum(by_pass.values()), 3),
        "passes_share_of_inductor": round(sum(by_pass.values()) / inner, 4),
        "pass_seconds": {name: round(seconds, 3) for name, seconds in by_pass.items()},
        "relative_error": float(f"{error:.2e}"),
    }


def eager(layers: int, inputs: dict[str, Any]) -> torch.Tensor:
    model, _ = model_and_inputs(layers)
    output: torch.Tensor = model(**inputs)[0]
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="4 layers; writes nothing")
    options = parser.parse_args()
    layers = 4 if options.quick else 40
    results = []
    with torch._inductor.config.patch(force_disable_caches=True):
        # A process's first compilation loads much of PyTorch: it belongs to nobody's time.
        inductor_alone(1, regional=False)
        for regional in (True, False):
            result = {"layers": layers, "regional": regional, **with_svg2(layers, regional)}
            result["inductor_alone_first_call_s"] = round(inductor_alone(layers, regional), 2)
            results.append(result)
            print(result, flush=True)
    if not options.quick:
        print(write_results("compile_time", results))


if __name__ == "__main__":
    main()
