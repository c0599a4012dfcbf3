"""Regions become part of the graph, and compute the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.inline_subgraphs import inline_subgraphs
from tests.passes.attention_graphs import dynamo_graph, model_of, reasons, sdpa, video


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([model_of(sdpa) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + region(block, x)
        return x


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of(lambda q, k, v: Doubled.apply(sdpa(q, k, v)))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(x))


@pytest.mark.parametrize(
    ("model", "grad", "regions", "sites"),
    [(Twice, False, 2, 2), (WithFunction, True, 1, 1), (WithFunction, False, 0, 1)],
)
def test_regions_are_inlined(model: type[nn.Module], grad: bool, regions: int, sites: int) -> None:
    torch.manual_seed(0)
    module = model().eval()
    captured = []

    def backend(gm, examples):
        captured.append(copy_graph_module(gm))
        return gm

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        expected = torch.compile(module, backend=backend, fullgraph=True)(video()).detach()
    (gm,) = captured
    assert sum(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes) == regions
    assert inline_subgraphs(gm) == regions
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)
    assert reasons(gm) == ["sparse"] * sites
    tensors = {**dict(module.named_parameters())}
    inputs = [
        video() if "parameters" not in node.name else next(t for n, t in tensors.items() if _flat(n) in node.name)
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], expected, rtol=0, atol=0)


def _flat(name: str) -> str:
    *path, leaf = name.split(".")
    return "_".join(f"modules_{part}" for part in path) + f"_parameters_{leaf}_"


def test_a_graph_without_regions_is_left_alone() -> None:
    gm, _ = dynamo_graph(model_of(sdpa), video())
    before = gm.code
    assert inline_subgraphs(gm) == 0 and gm.code == before
