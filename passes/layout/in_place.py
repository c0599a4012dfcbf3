"""Which values of a graph are written in place, and by which node last.

out = torch.empty_like(x);  out[..., 0::2] = a;  out[..., 1::2] = b        ->  {out: the second assignment}
"""

from __future__ import annotations

import operator

from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from svg2_compile.passes.graph.values import node_value

_NAMES = "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul ilshift irshift"
_OPERATORS = frozenset(getattr(operator, name) for name in _NAMES.split())


def last_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every value that a later node writes to, directly or through a view, the last such node.

    Writes that cannot be seen in the form of a call (`inplace=True`, `out=`) are missing.
    """
    result: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not _writes(node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        value: fx.Node | None = node.args[0]
        while value is not None:
            result[value] = node
            value = _viewed(value)
    return result


def _writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return node.target in _OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory `node` shares, by the fake values of the metadata."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    own, base = node_value(node), node_value(node.args[0])
    if not isinstance(own, FakeTensor) or not isinstance(base, FakeTensor):
        return None  # no tensor, or one inside a vmap, which has no memory of its own
    return node.args[0] if own.untyped_storage()._cdata == base.untyped_storage()._cdata else None
