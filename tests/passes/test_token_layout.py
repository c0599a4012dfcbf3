"""The analysis on small graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from svg2_compile.passes.layout.axes import UNKNOWN, collapse, single
from svg2_compile.passes.token_layout import TokenLayouts, analyse_token_layout
from tests.zoo.graphs import Analysed, attention_operands, short, spelled
from tests.zoo.models import build


class Joint(nn.Module):
    """Joint attention over a video and a text, flattened with the batch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 24)

    def forward(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video and text after one attention."""
        tokens = torch.cat([text, video], 1)
        batch, length, _ = tokens.shape
        projected = self.proj(tokens.flatten(0, 1)).view(batch, length, 3, 2, 4)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        out = tokens + out.transpose(1, 2).flatten(2)
        return out[:, text.shape[1] :], out[:, : text.shape[1]]


def analyse_module(module: nn.Module, *inputs: Any, dynamic: bool = False) -> Analysed:
    found: list[Analysed] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append((gm, analyse_token_layout(gm)))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (analysed,) = found
    return analysed


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_longest_output_is_the_video(dynamic: bool) -> None:
    gm, layouts = analyse_module(Joint(), torch.randn(2, 5, 8), torch.randn(2, 21, 8), dynamic=dynamic)
    assert {short(name) for name in layouts.latent} == {"video"}
    ((_, query, _),) = attention_operands(gm)
    segments = layouts.segments(query, -2) or ()
    assert [set(map(short, s.sources)) for s in segments] == [{"text"}, {"video"}]
    assert all(s.length.is_Integer is not dynamic for s in segments)


def test_analysis_leaves_graph_metadata_and_guards_alone() -> None:
    seen: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        def state() -> tuple[Any, ...]:
            values = [n.meta.get("example_value") for n in gm.graph.nodes]
            tensors = [v for v in values if isinstance(v, Tensor)]
            shape_env = tensors[0].fake_mode.shape_env  # type: ignore[attr-defined]
            guards = (len(shape_env.guards), dict(shape_env.replacements), dict(shape_env.deferred_runtime_asserts))
            return gm.print_readable(print_output=False), [id(v) for v in values], [v._version for v in tensors], guards

        before = state()
        analyse_token_layout(gm)
        seen["same"] = before == state()
        return gm

    torch._dynamo.reset()
    module, inputs = build("wan_t2v")
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=True)(**inputs)
    assert seen["same"]


def test_ambient_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        gm, layouts = analyse_module(Joint(), torch.randn(2, 5, 8), torch.randn(2, 21, 8))
        assert torch.is_autocast_enabled("cpu")
    assert not layouts.unruled_ops
    ((_, query, _),) = attention_operands(gm)
    assert spelled(layouts, query) == "text:5|video:21"


class AutocastInside(nn.Module):
    """A region of the graph under autocast."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """[B, N, C] times [C, C] in bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            return x @ weight


def test_autocast_region_is_left_as_it_was_found() -> None:
    _, layouts = analyse_module(AutocastInside(), torch.randn(2, 7, 4), torch.randn(4, 4))
    assert not layouts.unruled_ops
    assert not torch.is_autocast_enabled("cpu")


class FlexAttention(nn.Module):
    """Attention that Dynamo keeps as one higher-order operator."""

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        """[B, H, N, D] attends to itself and to a text."""
        keys = torch.cat([video, text], 2)
        return flex_attention(video, keys, keys)


def test_flex_attention_has_the_tokens_of_its_query() -> None:
    gm, layouts = analyse_module(FlexAttention(), torch.randn(2, 2, 21, 16), torch.randn(2, 2, 5, 16))
    assert set(layouts.unruled_ops) <= {"_add_batch_dim", "_remove_batch_dim"}  # the vmap that makes its block mask
    (output,) = gm.graph.find_nodes(op="output")
    assert spelled(layouts, output.args[0][0]) == "video:21"
    (attention,) = layouts.attentions
    assert [int(s.length) for s in collapse(attention.key) or ()] == [21, 5]


class Checkpointed(nn.Module):
    """A region with a graph of its own."""

    def forward(self, video: Tensor) -> Tensor:
        """[B, N, C] as it was."""
        return checkpoint(lambda x: torch.sin(x) + 1, video, use_reentrant=False)


def test_checkpointed_region_is_read_in_place() -> None:
    gm, layouts = analyse_module(Checkpointed(), torch.randn(2, 21, 8))
    assert not layouts.unruled_ops
    (output,) = gm.graph.find_nodes(op="output")
    assert spelled(layouts, output.args[0][0], 1) == "video:21"


class WritesToSharedValue(nn.Module):
    """`inplace=True` hides a write; two equal sums must not share it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two values that are abstractly equal until one of them is written."""
        first, second = x + 1, x + 1
        nn.functional.relu(first, inplace=True)
        first.mul_(y)
        return first, second


def test_a_write_changes_one_of_two_equal_values() -> None:
    gm, layouts = analyse_module(WritesToSharedValue(), torch.randn(2, 7, 4), torch.randn(7, 1))
    (output,) = gm.graph.find_nodes(op="output")
    first, second = output.args[0]
    assert spelled(layouts, second, 1) == "x:7"
    assert spelled(layouts, first, 1) in ("x+y:7", "x:7")  # of() tells the state where the node stands


def test_an_operator_that_fails_on_fake_tensors_is_unknown() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    failing = graph.call_function(_refuse, (x,))
    graph.output(failing)
    gm = fx.GraphModule({}, graph)
    with torch._subclasses.FakeTensorMode():
        x.meta["val"] = failing.meta["val"] = torch.empty(2, 7, 4)
    layouts = analyse_token_layout(gm)
    assert layouts.of(failing) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert layouts.segments(failing, 1) is None
    assert len(layouts.unruled_ops) == 1
    assert layouts.of(x) == (single({"x"}, 2), single({"x"}, 7), single({"x"}, 4))


def _refuse(x: Tensor) -> Tensor:
    raise RuntimeError("no fake implementation")


def test_a_placeholder_without_metadata_is_an_error() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ValueError, match=r"placeholder 'x' .*metadata.*torch.export"):
        analyse_token_layout(gm)


def test_parameters_can_be_named() -> None:
    graph = fx.Graph()
    x, table = graph.placeholder("x"), graph.placeholder("table")
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, table))
    graph.output(total)
    with torch._subclasses.FakeTensorMode():
        for node in (x, table, total):
            node.meta["val"] = torch.empty(7, 4)
    gm = fx.GraphModule({}, graph)

    def sources(layouts: TokenLayouts) -> frozenset[str]:
        axes = layouts.of(total)
        assert axes is not None
        return axes[0].sources

    assert sources(analyse_token_layout(gm)) == {"x", "table"}
    assert sources(analyse_token_layout(gm, parameters=["table"])) == {"x"}


def test_the_cost_of_many_layers_is_that_of_the_distinct_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg2_compile.passes.layout.mode import LayoutMode

    calls = Counter[int]()
    original = LayoutMode._record

    def counting(self: LayoutMode, call: Any) -> None:
        calls[depth] += 1
        original(self, call)

    monkeypatch.setattr(LayoutMode, "_record", counting)
    for depth in (2, 8):
        block = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(depth)))
        _, layouts = analyse_module(block, torch.randn(2, 9, 8))
        assert len(layouts.axes) > 3 * depth
    assert calls[8] <= calls[2] + 2
