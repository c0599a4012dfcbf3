"""Layers are told apart by part, by weights and by order; tied, replaced and dying weights."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from svg2_compile.runtime.layers import Layer, Layers, LayerTable, ParameterPaths
from svg2_compile.runtime.model_call import ModelCall, Part


class Model(nn.Module):
    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(num_blocks))


class Gone:
    """What a session does when the weights of a layer are gone."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def forget(self, layer: Layer) -> None:
        self.layers.append(layer)


GONE = Gone()


def _table(gone: Gone = GONE) -> LayerTable:
    return LayerTable(Layers(gone.forget))


def _args(block: nn.Module) -> list[Any]:
    x = torch.zeros(1, 2)
    return [x, *block.parameters(), 7]


def _find_all(table: LayerTable, model: Model, order: Any = None, label: str = "") -> list[Layer]:
    """One call of the model, whose blocks are graphs of their own."""
    call = ModelCall(None, model, label, list)
    paths = ParameterPaths(model)
    blocks = model.blocks if order is None else [model.blocks[i] for i in order]
    return [table.find(_args(block), None, call, paths) for block in blocks]


def test_weights_tell_layers_apart_whatever_their_order() -> None:
    table, model = _table(), Model()
    first = _find_all(table, model)
    assert len(set(first)) == 3
    assert [layer.label for layer in first] == ["blocks.0", "blocks.1", "blocks.2"]
    assert _find_all(table, model) == first
    # A cache runs only some of the blocks.
    assert _find_all(table, model, [0, 2]) == [first[0], first[2]]


def test_two_models_are_two_sets_of_layers() -> None:
    table, one, other = _table(), Model(), Model()
    mine, theirs = _find_all(table, one, label="transformer"), _find_all(table, other, label="transformer_2")
    assert len({*mine, *theirs}) == 6
    assert (mine[1].label, theirs[1].label) == ("transformer.blocks.1", "transformer_2.blocks.1")


def test_replaced_parameters_are_the_same_layers() -> None:
    """Sequential offloading makes new Parameter objects for every call."""
    table, model = _table(), Model()
    first = _find_all(table, model)
    for part in model.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.data.clone())
    assert _find_all(table, model) == first


def test_tied_layers_are_told_apart_by_their_order_in_a_call() -> None:
    table, model = _table(), Model(2)
    first = _find_all(table, model, [0, 0, 1, 0])
    assert len(set(first)) == 4
    assert _find_all(table, model, [0, 0, 1, 0]) == first


def test_layers_without_weights_go_by_their_order_in_a_call() -> None:
    table, model = _table(), Model()
    x = torch.zeros(1, 2)

    def call() -> list[Layer]:
        model_call = ModelCall(None, model, "", list)
        return [table.find([x], None, model_call, None) for _ in range(3)]

    first = call()
    assert len(set(first)) == 3 and call() == first


def test_parts_go_by_their_module_also_where_it_is_used_twice() -> None:
    table, model = _table(), Model()
    parts = [Part(None, block, f"blocks.{i}") for i, block in enumerate(model.blocks)]

    def call(order: list[int]) -> list[Layer]:
        model_call = ModelCall(None, model, "", list)
        return [table.find(_args(model.blocks[i]), parts[i], model_call, None) for i in order]

    first = call([0, 1, 2, 0])
    assert len(set(first)) == 4 and call([0, 1, 2, 0]) == first
    assert [layer.label for layer in first] == ["blocks.0", "blocks.1", "blocks.2", "blocks.0"]


def test_without_a_known_model_weights_are_known_by_identity() -> None:
    table, model = _table(), Model()
    first = [table.find(_args(block), None, None, None) for block in model.blocks]
    assert len(set(first)) == 3
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # offloading moves the data under them
    assert [table.find(_args(block), None, None, None) for block in model.blocks] == first


def test_a_graph_that_is_compiled_again_serves_the_same_layers() -> None:
    """For another size, whose inputs may come in another order; another piece of the model is another layer."""
    layers, model = Layers(GONE.forget), Model()
    call = ModelCall(None, model, "", list)
    paths = ParameterPaths(model)
    block = model.blocks[1]
    first = LayerTable(layers, ("attn1",)).find(_args(block), None, call, paths)
    again = ModelCall(None, model, "", list)
    assert LayerTable(layers, ("attn1",)).find(_args(block)[::-1], None, again, paths) is first
    assert LayerTable(layers, ("attn2",)).find(_args(block), None, again, paths) is not first
    alone = [LayerTable(layers).find(args, None, None, None) for args in (_args(block), _args(block)[::-1])]
    assert alone[0] is alone[1]
    assert layers.parameter_ids() == {id(parameter) for parameter in block.parameters()}


def test_layers_die_with_their_weights_or_their_model() -> None:
    gone = Gone()
    layers = Layers(gone.forget)
    table = LayerTable(layers)
    blocks = Model(), Model()
    first = table.find(_args(blocks[0].blocks[0]), None, None, None)
    second = _find_all(table, blocks[1])
    assert gone.layers == []
    del blocks
    gc.collect()
    assert len(gone.layers) == 4
    del first, second, gone.layers[:]
    assert table.labels() == [] and layers.parameter_ids() == set()


def test_parameters_that_appear_later_are_found() -> None:
    model = Model()
    paths = ParameterPaths(model)
    name, parameter = list(model.named_parameters())[4]
    assert paths.of(parameter) == name == "blocks.1.0.weight"
    model.adapter = nn.Linear(2, 2)
    assert paths.of(model.adapter.bias) == "adapter.bias"
    assert paths.of(nn.Parameter(torch.zeros(1))) is None
