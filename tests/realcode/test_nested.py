"""Attention over nested tensors (jagged): PyTorch's own result, and never dense without a word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import svg2_compile
from svg2_compile.backend import Svg2Backend
from svg2_compile.runtime.session import Session, report_of
from svg2_compile.settings.config import Svg2Config
from tests.support import IDENTITY, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
LENGTHS = [(100, 60), (100,)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 96), nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = (part.contiguous() for part in self.qkv(tokens).chunk(3, -1))
        query, key, value = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def jagged(lengths: tuple[int, ...]) -> Tensor:
    torch.manual_seed(1)
    return torch.nested.nested_tensor([torch.randn(length, 8) for length in lengths], layout=torch.jagged)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_plain_compile_gives_the_result_and_explain_says_why_it_is_dense(lengths: tuple[int, ...]) -> None:
    module, tokens = Attention().eval(), jagged(lengths)
    with torch.no_grad():
        expected = module(tokens)
        compiled = torch.compile(module, backend="svg2", options=IDENTITY)
        assert_close(compiled(tokens).values(), expected.values())
        torch._dynamo.reset()
        assert "graph break" in str(svg2_compile.explain(module, tokens))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_an_enabled_model_gives_the_result_and_says_that_it_is_dense(lengths: tuple[int, ...]) -> None:
    module, tokens = Attention().eval(), jagged(lengths)
    with torch.no_grad():
        expected = module(tokens)
        with svg2_compile.enable(module, **IDENTITY) as enabled:
            assert_close(module(tokens).values(), expected.values())
            report = enabled.report()
    assert not report.runs and "no attention of Attention ran in a compiled graph" in " ".join(str(report).split())


@pytest.mark.parametrize("lengths", LENGTHS)
def test_where_it_is_in_a_graph_it_is_dense_with_the_reason(lengths: tuple[int, ...]) -> None:
    """As on a GPU: on a CPU PyTorch does not trace it."""
    tokens = jagged(lengths)
    query = tokens.unflatten(-1, (2, 4)).transpose(1, 2)
    graph = fx.Graph()
    node = graph.placeholder("query")
    out = graph.call_function(F.scaled_dot_product_attention, (node, node, node))
    graph.output((out,))
    node.meta["example_value"] = query
    out.meta["example_value"] = expected = F.scaled_dot_product_attention(query, query, query)
    session = Session(Svg2Config.from_options(IDENTITY))
    run = Svg2Backend(session.config, session)(fx.GraphModule(nn.Module(), graph), [query])
    with torch.no_grad():
        (actual,) = run(query)
    assert_close(actual.values(), expected.values())
    (site,) = report_of([session]).sites
    assert (site.decision, site.reason) == ("dense", "nested_tensor") and "padded tensor" in site.detail
