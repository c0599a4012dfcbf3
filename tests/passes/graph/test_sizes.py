"""Symbolic sizes: as numbers, solved for their symbol, and as nodes."""

from __future__ import annotations

import pytest
import sympy
import torch

from svg2_compile.passes.graph.sizes import SizeEmitter, plain_size, solve_for_symbol
from tests.passes.attention_graphs import dynamo_graph, model_of, sdpa, video


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


def test_plain_sizes():
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    assert type(plain_size(sympy.Integer(7))) is int and plain_size(7) == 7
    assert plain_size(symbol + 1) == symbol + 1
