"""Insert nodes into an FX graph while keeping its fake-tensor metadata true.

Both dialects of graph are served: Dynamo's torch-level graph keeps the value of a node under ``example_value``, an
exported ATen graph under ``val``. A node that a pass inserts is evaluated on the fake values of its arguments, so the
metadata of the rewritten graph stays as complete as that of the graph that came in.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.graph.values import find_fake_mode, metadata_key

__all__ = ["GraphBuilder", "copy_graph_module"]

# What a node inserted next to another inherits from it: where in the user's model it comes from.
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph of ``gm`` so that it can be rewritten; weights and submodules are shared, not copied."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    graph.output(output)
    for original, copied in copies.items():
        # AOTAutograd asks every placeholder of a Dynamo graph where it came from.
        if hasattr(original, "_dynamo_source"):
            copied._dynamo_source = original._dynamo_source
    new_output = graph.output_node()
    new_output.meta = dict(gm.graph.output_node().meta)
    copied_module = fx.GraphModule(gm, graph, class_name=gm.__class__.__name__)
    copied_module.meta = dict(gm.meta)
    return copied_module


class GraphBuilder:
    """Inserts call_function nodes in front of ``anchor``, evaluated on fake values.

    Args:
        graph: the graph to extend.
        anchor: the node in front of which everything is inserted, and whose provenance new nodes inherit.
        prefix: prepended to the names asked for, so that the nodes of one site can be told from another's.
    """

    def __init__(self, graph: fx.Graph, anchor: fx.Node, prefix: str = "") -> None:
        self.graph = graph
        self.anchor = anchor
        self.prefix = prefix
        self.key = metadata_key(graph)
        self._fake_mode = find_fake_mode(graph)
        self._provenance = {key: anchor.meta[key] for key in _PROVENANCE if key in anchor.meta}

    def value(self, node: fx.Node) -> Any:
        """The fake value of a node (a FakeTensor, a tuple of them, a number)."""
        return node.meta.get(self.key)

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Insert ``target(*args, **kwargs)`` and return its node."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node(
                "call_function", target, args, kwargs, name=f"{self.prefix}{name}" if name else None
            )
        node.meta.update(self._provenance)
        node.meta[self.key] = self._evaluate(target, args, kwargs)
        return node

    def unpack(self, node: fx.Node, names: Sequence[str]) -> tuple[fx.Node, ...]:
        """Insert one getitem for each output of a multi-output node."""
        return tuple(self.call(operator.getitem, node, index, name=name) for index, name in enumerate(names))

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """The size of one axis: an int where it is static, else a node that reads it."""
        extent = self.value(node).shape[dim]
        if isinstance(extent, int):
            return extent
        return self.call(torch.ops.aten.sym_size.int, node, dim)

    def narrow(self, node: fx.Node, dim: int, start: Any, length: Any) -> fx.Node:
        """``node[..., start:start+length, ...]`` along ``dim``; the node itself where that is the whole axis."""
        extent = self.value(node).shape[dim]
        if (
            isinstance(start, int)
            and start == 0
            and isinstance(length, int)
            and isinstance(extent, int)
            and length == extent
        ):
            return node
        return self.call(torch.ops.aten.narrow.default, node, dim, start, length)

    def _evaluate(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), self.value)
        with self._fake_scope():
            return target(*fake_args, **fake_kwargs)

    @contextlib.contextmanager
    def _fake_scope(self) -> Iterator[None]:
        with torch.no_grad():
            if self._fake_mode is None:
                yield
            else:
                with self._fake_mode:
                    yield
