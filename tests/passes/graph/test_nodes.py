"""Names, arguments and modules of graph nodes."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from svg2_compile.passes.graph.nodes import bind_arguments, module_path, operator_name


def _node(target, op="call_function", *args, **kwargs):
    return fx.Graph().create_node(op, target, args, kwargs)


def test_operator_names():
    assert operator_name(_node(torch.softmax)) == "softmax"
    assert operator_name(_node(torch.ops.aten._softmax.default)) == "_softmax"
    assert operator_name(_node("softmax", "call_method")) == "softmax"
    assert operator_name(_node("weight", "get_attr")) == ""


def test_arguments_by_name():
    node = _node(torch.ops.aten.scaled_dot_product_attention.default, "call_function", 1, 2, 3, is_causal=True)
    assert bind_arguments(node, ()) == {"query": 1, "key": 2, "value": 3, "is_causal": True}
    assert bind_arguments(_node(torch.relu, "call_function", 5), ("x", "y")) == {"x": 5}


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self'].__dict__['_modules']['blocks'].3.attn1", "blocks.3.attn1"),
        ("L['self']._modules['blocks'][3].attn1", "blocks.3.attn1"),
        ("L['fn'].__self__.transformer.attn", "transformer.attn"),
        ("L['self'].blocks.0.forward.func.__closure__[0].cell_contents.forward.attn1", "blocks.0.attn1"),
        ("blocks.3.attn1", "blocks.3.attn1"),
    ],
)
def test_module_paths(written, path):
    node = _node(torch.relu)
    node.meta["nn_module_stack"] = {"key": (written, nn.Module)}
    assert module_path(node) == path


def test_without_a_module_the_node_names_itself():
    assert module_path(_node(torch.relu)) == "relu"
