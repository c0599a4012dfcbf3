"""Names, arguments and symbolic sizes of graph nodes."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx, nn

from svg2_compile.passes.graph.nodes import bind_arguments, module_path, operator_name
from svg2_compile.passes.graph.sizes import SizeEmitter, solve_for_symbol
from tests.passes.attention_graphs import dynamo_graph, model_of, sdpa, video


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
        ("blocks.3.attn1", "blocks.3.attn1"),
    ],
)
def test_module_paths(written, path):
    node = _node(torch.relu)
    node.meta["nn_module_stack"] = {"key": (written, nn.Module)}
    assert module_path(node) == path


def test_without_a_module_the_node_names_itself():
    assert module_path(_node(torch.relu)) == "relu"


def test_sizes_become_nodes_that_compute_them():
    model = model_of(sdpa)
    gm, inputs = dynamo_graph(model, video(2, 21), dynamic=True)
    placeholder = next(
        n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta["example_value"], torch.SymInt)
    )
    symbol = placeholder.meta["example_value"].node.expr
    output = gm.graph.output_node()
    emitter = SizeEmitter(gm.graph)
    assert emitter.emit(7, output) == 7 and emitter.emit(sympy.Integer(7), output) == 7
    node = emitter.emit(symbol * 3 + 1, output)
    output.args = ((node,),)
    gm.recompile()
    position = gm.graph.find_nodes(op="placeholder").index(placeholder)
    assert gm(*inputs) == (inputs[position] * 3 + 1,)
    with pytest.raises(ValueError, match="s999"):
        emitter.emit(sympy.Symbol("s999") + 1, output)


def test_a_symbol_that_only_derived_sizes_have():
    """A dimension exported as 2 * n + 4: nothing has the size n itself."""
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(model_of(sdpa), (video(1, 20),), dynamic_shapes=({1: 2 * n + 4},))
    gm = program.graph_module
    tokens = next(node for node in gm.graph.find_nodes(op="placeholder") if node.name == "hidden_states")
    symbol, factor, offset = solve_for_symbol(tokens.meta["val"].shape[1].node.expr)
    assert (factor, offset) == (2, 4)
    node = SizeEmitter(gm.graph).emit(symbol * 3, gm.graph.output_node())
    assert str(node.meta["val"].node.hint) == "24"


def test_solving_for_a_symbol():
    a, b = sympy.symbols("a b", integer=True, positive=True)
    assert solve_for_symbol(a) == (a, 1, 0)
    assert solve_for_symbol(3 * a - 2) == (a, 3, -2)
    for other in (a + b, a * b, a**2, -a, sympy.Integer(3), a / 2):
        assert solve_for_symbol(other) is None
