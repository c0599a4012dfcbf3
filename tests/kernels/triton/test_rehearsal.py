"""The whole way from torch.compile(backend="svg2") to Triton launches, on a CUDA device that is not there.

A model is compiled on the CPU with an inner backend that keeps the lowered graph. That graph is then run on fake CUDA
tensors, every svg2 op by its Triton implementation, with launches noted instead of made. A host read of device data is
an error on a fake tensor, so a run that ends has made none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton", reason="Triton is on PyPI for Linux only")

from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from svg2_compile.kernels.triton import implementation
from svg2_compile.kernels.triton.rehearsal import TARGETS, Launch, compile_launch, record_launches
from svg2_compile.passes import block_attention
from tests.support import IDENTITY
from tests.zoo.models import build

PLAIN = {"compensation": "none"}
EAR = {"top_p": 0.8, "compensation": "centroid", "routing": "error"}
FIRST_ORDER = {"density": 0.5, "compensation": "first_order"}
GUARD = {**FIRST_ORDER, "target_error": 0.02}
KEPT: list[tuple[fx.GraphModule, list[Any]]] = []


def _keep(graph: fx.GraphModule, examples: list[Any]) -> Any:
    KEPT.append((graph, list(examples)))
    return make_boxed_func(graph.forward)


torch._dynamo.register_backend(aot_autograd(fw_compiler=_keep), name="svg2_test_keep")


def lowered_graph(name: str, options: dict[str, Any]) -> tuple[fx.GraphModule, list[Any]]:
    """What the inner backend gets for one sparse step of a diffusers transformer, and example inputs."""
    KEPT.clear()
    torch._dynamo.reset()
    model, inputs = build(name)
    options = {**IDENTITY, **options, "inner_backend": "svg2_test_keep"}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "starts_from_all_clusters", lambda device: False)  # as on a GPU
        torch.compile(model, backend="svg2", options=options)(**inputs)
    sparse = [kept for kept in KEPT if any("svg2" in str(node.target) for node in kept[0].graph.nodes)]
    assert len(sparse) == 1
    return sparse[0]


class OnFakeCuda(fx.Interpreter):
    """Runs a lowered graph with all its tensors on the imagined device, svg2 ops by their Triton implementation."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, "device": torch.device("cuda")} if "device" in kwargs else kwargs
        schema = str(getattr(target, "_schema", ""))
        if schema.startswith("svg2::"):
            return getattr(implementation, target._schema.name.removeprefix("svg2::"))(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def on_cuda(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def rehearse(name: str, options: dict[str, Any]) -> tuple[fx.GraphModule, list[Launch]]:
    graph, examples = lowered_graph(name, options)
    with record_launches(90) as (_, launches):
        OnFakeCuda(graph).run(*[on_cuda(value) for value in examples])
    return graph, launches


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan_t2v", PLAIN),
        ("hunyuan_video", EAR),
        ("ltx_video", PLAIN),
        ("hunyuan_video", FIRST_ORDER),
        ("wan_t2v", GUARD),
    ],
)
def test_from_torch_compile_to_launches_without_a_host_read(name: str, options: dict[str, Any]) -> None:
    graph, launches = rehearse(name, options)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name or ".item" in name]
    first_order = options in (FIRST_ORDER, GUARD)
    attention = "first_order_attention" if first_order else "block_sparse_attention"
    sites = sum(f"svg2.{attention}" in name for name in names)
    kernels = Counter(launch.name for launch in launches)
    assert sites >= 1
    assert kernels["attend"] >= sites  # one per pass
    assert kernels["_assign"] == kernels["_update"] >= 2 * sites  # one per iteration, queries and keys
    assert kernels["_start"] == 2 * sites
    assert kernels["_select_rows"] == (0 if first_order else sites)
    for kernel in ("_log_errors", "_cluster_means"):
        assert kernels[kernel] == (0 if options == PLAIN else sites)
    for kernel in ("_cluster_variances", "_pick_farthest", "_squared_shares", "_write_map", "_residuals", "_slopes"):
        assert kernels[kernel] == (sites if first_order else 0)
    assert kernels["_count_digits"] == (8 * sites if first_order else 0)
    assert kernels["_exact_rows"] == (sites if options == GUARD else 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [EAR, FIRST_ORDER])
def test_every_launch_of_a_model_compiles_for_hopper(options: dict[str, Any]) -> None:
    _, launches = rehearse("hunyuan_video", options)
    distinct = {(launch.name, str(launch.arguments)): launch for launch in launches}
    by_name = {launch.name: launch for launch in distinct.values()}
    assert len(by_name) >= 15
    for launch in by_name.values():
        assert compile_launch(launch, TARGETS["sm_90"]).registers


def test_a_host_read_would_be_noticed() -> None:
    with record_launches() as (_, launches), pytest.raises(DataDependentOutputException):
        torch.empty(3, device="cuda").sum().item()
    assert launches == []


def test_fake_launches_are_noted_with_what_a_launcher_needs() -> None:
    with record_launches(90, num_processors=100) as (_, launches):
        x = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="cuda")
        order = torch.empty(1, 2, 300, dtype=torch.int32, device="cuda")
        out = implementation.permute_tokens(x, order)
    assert out.shape == x.shape
    (launch,) = launches
    assert launch.name == "_move_rows"
    assert launch.arguments["x"] == "*bf16" and launch.arguments["order"] == "*i32"
    assert launch.arguments["x_n"] == 64 and launch.arguments["GATHER"] is True
    assert launch.options == {"num_warps": 4}
    assert launch.grid == (3, 2)
