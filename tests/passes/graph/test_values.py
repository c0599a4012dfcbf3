"""What the metadata of a graph says of it as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svg2_compile.passes.graph.values import fake_mode_of, find_fake_mode, graph_device, input_values
from tests.passes.attention_graphs import dynamo_graph, exported_graph, model_of, sdpa, video


def _with_inputs(*values):
    graph = fx.Graph()
    for i, value in enumerate(values):
        graph.placeholder(f"input_{i}").meta["val"] = value
    graph.output(())
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("exported", [False, True])
def test_inputs_of_both_dialects(exported):
    model = model_of(sdpa)
    gm, inputs = exported_graph(model, video(), decomposed=False) if exported else dynamo_graph(model, video())
    assert [value.shape for value in input_values(gm)] == [value.shape for value in inputs]


@pytest.mark.parametrize(
    ("inputs", "device"), [(["cpu", "cuda:0"], "cuda:0"), (["meta"], "meta"), (["cpu", "meta"], "cpu"), ([], "cpu")]
)
def test_the_device_is_an_accelerator_if_an_input_is_on_one(inputs, device):
    with FakeTensorMode():
        values = [torch.empty(2, device=name) for name in inputs]
    assert graph_device(_with_inputs(3, *values)) == torch.device(device)


def test_the_fake_mode_of_a_graph_is_that_of_its_metadata():
    gm, _ = dynamo_graph(model_of(sdpa), video())
    (mode,) = {value.fake_mode for value in input_values(gm)}
    assert find_fake_mode(gm.graph) is mode and fake_mode_of(gm) is mode


def test_a_graph_without_fake_tensors_gets_a_new_mode():
    gm = _with_inputs(3)
    assert find_fake_mode(gm.graph) is None
    assert isinstance(fake_mode_of(gm), FakeTensorMode)
