"""CUDA graphs of the whole rewritten attention, and the rewritten attention under Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.support import no_host_synchronisation, poison_free_memory
from tests.gpu.test_pipeline import EXTRAS, LAYOUTS, inputs
from tests.kernels.helpers import attention_pipeline

SEEDS = (0, 10, 20)


def runner(options: dict[str, Any], extra: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_pipeline(query, key, value, density=0.3, **EXTRAS[extra], **options)[0]

    return run


def capture(run: Callable[..., Tensor], given: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of one call, and the tensor that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*given)
    return graph, out


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replays_follow_their_inputs(layout: str, extra: str, cuda: torch.device) -> None:
    """Other inputs make other clusters, sizes and lists; a replay must find them all anew."""
    static, options = inputs(cuda, torch.bfloat16, **LAYOUTS[layout])
    run = runner(options, extra)
    graph, out = capture(run, static)
    for seed in SEEDS:
        fresh, _ = inputs(cuda, torch.bfloat16, **LAYOUTS[layout], seed=seed)
        fresh = [x + 0.3 * seed for x in fresh]
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
        poison_free_memory(cuda)
        with no_host_synchronisation(cuda):
            graph.replay()
        assert torch.equal(out, run(*fresh)), f"replay with the inputs of seed {seed}"


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_inductor_runs_the_operators_as_they_are(extra: str, mode: str | None, cuda: torch.device) -> None:
    given, options = inputs(cuda, torch.bfloat16, **LAYOUTS["context and masked keys"])
    run = runner(options, extra)
    compiled = torch.compile(run, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in (*SEEDS, 0, 10):
            given, _ = inputs(cuda, torch.bfloat16, **LAYOUTS["context and masked keys"], seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            actual = compiled(*given).clone()
            assert torch.equal(actual, run(*given))


def test_inductor_keeps_sizes_symbolic(cuda: torch.device) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_pipeline(query, key, value, num_q_clusters=4, num_k_clusters=11, top_p=0.8)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for num_tokens in (300, 1001, 777, 4096):
            given = [torch.randn(1, 2, num_tokens, 64, device=cuda, dtype=torch.bfloat16) for _ in range(3)]
            assert torch.equal(compiled(*given), run(*given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
