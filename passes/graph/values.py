"""What the metadata of a graph says about its nodes: fake values, parameters, the fake mode.

Both dialects are read: Dynamo keeps a node's fake value as `example_value`, torch.export as `val`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


def node_value(node: fx.Node) -> Any:
    """The example value of a node: a fake tensor, a symbolic number, a tuple of them, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter, buffer or other attribute of a module, by its metadata."""
    if isinstance(node_value(node), (torch.nn.Parameter, torch.nn.Buffer)):
        return True
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        guard_source = source.guard_source() if callable(source.guard_source) else source.guard_source
        return bool(guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module())
    if "example_value" in node.meta:
        return "_parameters_" in node.name or "_buffers_" in node.name
    return node.name.startswith(("p_", "b_", "c_"))


def metadata_key(graph: fx.Graph) -> str:
    """The key under which this graph's nodes keep their fake values: "example_value" or "val"."""
    for node in graph.nodes:
        if node.op == "placeholder":
            # Strict export leaves Dynamo's metadata on some nodes beside its own.
            return "val" if "val" in node.meta else "example_value"
    return "val"


def input_values(gm: fx.GraphModule) -> list[Any]:
    """The example values of the graph's inputs, in their order."""
    return [node_value(node) for node in gm.graph.find_nodes(op="placeholder")]


def graph_device(gm: fx.GraphModule) -> torch.device:
    """The device that the graph computes on: an accelerator if any input is on one, else the CPU."""
    devices = [value.device for value in input_values(gm) if isinstance(value, torch.Tensor)]
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    return (accelerators or devices or [torch.device("cpu")])[0]


def has_nested(gm: fx.GraphModule) -> bool:
    """Whether some value of the graph is a nested tensor (sequences of several lengths as one tensor)."""
    return any(is_nested(node) for node in gm.graph.nodes)


def is_nested(node: fx.Node) -> bool:
    """Whether a node yields a nested tensor."""
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.is_nested


def find_fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the metadata of the graph belong to; None if they hold no fake tensor."""
    modes = (fake_mode_of_values(node_value(node)) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode of the graph's metadata; a new one where no node has a fake tensor."""
    mode = find_fake_mode(gm.graph)
    return FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode


def fake_mode_of_values(values: Any) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among ``values`` (any nesting); None where there is none."""
    for value in tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def has_number(value: Any) -> bool:
    """Whether the metadata knows the number in a tensor of one (a float that Dynamo made an input)."""
    return isinstance(value, FakeTensor) and value.dim() == 0 and value.item_memo is not None


def copy_number(known: Any, result: Any) -> bool:
    """Makes `item()` of `result` give the symbol that the metadata `known` gives, if any. Returns whether it did."""
    if not has_number(known) or not isinstance(result, FakeTensor) or result.dim() != 0:
        return False
    result.item_memo = known.item_memo
    return True
