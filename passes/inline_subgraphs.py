"""Rewrite: regions that torch keeps as graphs of their own become part of the graph.

Before (torch.compiler.nested_compile_region on a block; a torch.autograd.Function):

    out = invoke_subgraph(subgraph_0, "subgraph_0", tokens, weight)
    out = autograd_function_apply(fwd_body_0, bwd_body_0, query, key, value)

After: the nodes of the body, on the same operands. Attention inside is then found like any other.

Needs: no gradient is wanted (the backward of an autograd function goes). Guarantees: the same values; a region that
takes or returns something unexpected is left alone.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

__all__ = ["inline_subgraphs"]

_FIRST_OPERAND = {"invoke_subgraph": 2, "autograd_function_apply": 2, "wrap": 1}
_MOST_REGIONS = 10_000


def inline_subgraphs(gm: fx.GraphModule) -> int:
    """Inline all regions of ``gm`` in place, those inside of regions too. Returns how many there were."""
    count = 0
    while count < _MOST_REGIONS:
        if not any(_inline(gm, node) for node in list(gm.graph.nodes)):
            break
        count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _inline(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return False
    first = _FIRST_OPERAND.get(node.target.name())
    name = node.args[0] if first is not None and node.args else None
    if first is None or not isinstance(name, fx.Node) or name.op != "get_attr":
        return False
    body = gm.get_submodule(str(name.target))
    operands = node.args[first:]
    if not isinstance(body, fx.GraphModule) or len(body.graph.find_nodes(op="placeholder")) != len(operands):
        return False
    returned = body.graph.output_node().args[0]
    if node.target.name() == "autograd_function_apply":  # the result, and what the backward would need
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            return False
        returned = returned[0]
    reads = [user for user in node.users if user.target is operator.getitem]
    if isinstance(returned, (tuple, list)) and len(reads) != len(node.users):
        return False
    copies = _copied(gm, node, str(name.target), body, operands)
    result: Any = fx.map_arg(returned, copies.__getitem__)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for read in reads:
            read.replace_all_uses_with(result[read.args[1]])
            gm.graph.erase_node(read)
    gm.graph.erase_node(node)
    return True


def _copied(
    gm: fx.GraphModule, node: fx.Node, path: str, body: fx.GraphModule, operands: tuple[Any, ...]
) -> dict[fx.Node, Any]:
    """Copies of the body's nodes in front of ``node``, by the node that each is a copy of."""
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            copy = gm.graph.node_copy(inner, copies.__getitem__)
            if inner.op in ("get_attr", "call_module"):
                copy.target = f"{path}.{inner.target}"
            copies[inner] = copy
    return copies
