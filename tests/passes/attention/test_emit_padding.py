"""The nodes that padding needs: which keys are attended, and zeros for the queries that are padding."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svg2_compile.passes.attention.emit_padding import emit_valid, emit_zero_padding
from svg2_compile.passes.attention.masks import KeyPadding, QueryPadding
from svg2_compile.passes.graph.builder import GraphBuilder
from tests.passes.attention.masked_models import TOKENS, Masked, valid
from tests.passes.attention_graphs import HEADS, dynamo_graph, rewritten, video


def _built(emit, *inputs):
    """What the nodes that ``emit`` inserts compute of the inputs."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = [graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    output = graph.output(None)
    output.args = (emit(GraphBuilder(graph, anchor=output), *nodes),)
    return fx.GraphModule(nn.Module(), graph)(*inputs)


@pytest.mark.parametrize(
    ("means", "mask", "threshold"),
    [
        ("attend", valid()[:, None, None], 0.0),
        ("exclude", ~valid()[:, None, None], 0.0),
        ("bias", torch.where(valid(), 0.0, -10000.0)[:, None, None], -1000.0),
    ],
)
def test_valid_keys(means, mask, threshold):
    emitted = _built(lambda build, node: emit_valid(build, KeyPadding(node, means, threshold), 2, TOKENS), mask)
    assert emitted.dtype == torch.bool and torch.equal(emitted, valid()[:, None])


def test_valid_keys_of_one_mask_for_all_and_of_every_head():
    for mask, expected in (
        (valid()[0], valid()[:1, None].expand(2, 1, -1)),
        (valid()[:1], valid()[:1, None].expand(2, 1, -1)),
        (valid()[:, None, None].repeat(1, HEADS, 1, 1), valid()[:, None].expand(2, HEADS, -1)),
    ):
        emitted = _built(lambda build, node: emit_valid(build, KeyPadding(node, "attend"), 2, TOKENS), mask)
        assert torch.equal(emitted, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_queries_that_are_padding_become_zero(transposed):
    mask = valid()[:, None, None] if transposed else valid()[:, None, :, None]
    out = torch.ones(2, HEADS, TOKENS, 3)
    emitted = _built(lambda build, node, out: emit_zero_padding(build, QueryPadding(node, transposed), out), mask, out)
    assert torch.equal(emitted, valid()[:, None, :, None].float().expand_as(out))


def test_without_any_valid_key_the_result_is_zero_as_in_dense_attention():
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    model = Masked(lambda m: m[:, None, None]).eval()
    gm, inputs = dynamo_graph(model, video(tokens=TOKENS), mask)
    copied, _ = rewritten(gm)
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs)[0], model(video(tokens=TOKENS), mask))
