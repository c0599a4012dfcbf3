"""The collectives of a graph: over which groups of ranks they go, and which shard of a tensor is this rank's.

tensor = torch.ops._c10d_functional.all_to_all_single(x, [768, 768], [768, 768], "0")     group "0"
chunk = tokens.chunk(2, dim=1);  shard = chunk[0]                                         on rank 0 of 2
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from svg2_compile.passes.graph.nodes import bind_arguments, operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["NAMESPACES", "RankGroup", "is_collective", "process_group", "rank_groups", "sharding_nodes"]

NAMESPACES = ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})


@dataclass(frozen=True)
class RankGroup:
    """A process group. rank: of this process in it, None where torch.distributed does not know the group here."""

    name: str
    size: int
    rank: int | None


def is_collective(node: fx.Node) -> bool:
    """Whether a node talks to other ranks. Waiting for what was sent does not count."""
    target = node.target
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if node.op != "call_function" or not isinstance(target, OpOverloadPacket):
        return False
    namespace = target._qualified_op_name.partition("::")[0]
    return namespace in NAMESPACES and not operator_name(node).startswith("wait_tensor")


def rank_groups(gm: fx.GraphModule) -> tuple[RankGroup, ...]:
    """The groups that the collectives of a graph go over, those of DTensors included, in the order of the graph."""
    found: dict[str, RankGroup] = {}
    for node in gm.graph.nodes:
        if is_collective(node):
            name = _group_name(node)
            if name not in found:
                found[name] = _group(name, node)
        elif operator_name(node) == "redistribute":
            found |= {group.name: group for group in _groups_of_mesh(node_value(node)) if group.name not in found}
    return tuple(found.values())


def _groups_of_mesh(value: Any) -> list[RankGroup]:
    """The groups that a DTensor lies on."""
    mesh = getattr(value, "device_mesh", None)
    groups = [] if mesh is None else mesh.get_all_groups()
    distributed = torch.distributed
    return [RankGroup(g.group_name, distributed.get_world_size(g), distributed.get_rank(g)) for g in groups]


def _group_name(node: fx.Node) -> str:
    given = node.kwargs.get("group_name", node.kwargs.get("tag", node.args[-1] if node.args else ""))
    return str(given)


def _group(name: str, node: fx.Node) -> RankGroup:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        try:
            group = process_group(name)
        except (RuntimeError, LookupError, ValueError, TypeError):
            return RankGroup(name, _size_in_arguments(node), None)
        return RankGroup(name, distributed.get_world_size(group), distributed.get_rank(group))
    return RankGroup(name, _size_in_arguments(node), None)


def _size_in_arguments(node: fx.Node) -> int:
    target = node.target
    overload = target.default if isinstance(target, OpOverloadPacket) else target
    names = tuple(argument.name for argument in overload._schema.arguments)  # type: ignore[union-attr]
    arguments: dict[str, Any] = bind_arguments(node, names)
    splits = arguments.get("output_split_sizes")
    size = len(splits) if isinstance(splits, Sequence) else arguments.get("group_size", 0)
    return size if isinstance(size, int) else 0


def process_group(name: str) -> Any:
    """The process group that functional collectives know by a name."""
    resolve: Callable[[Any], Any] = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def sharding_nodes(gm: fx.GraphModule, groups: Sequence[RankGroup]) -> dict[fx.Node, int]:
    """Nodes that split a tensor into a part for every rank, of which this rank takes its own; with the number of parts.

    The graph of every rank looks the same but for the part that it takes, so that nothing may be read off which it is.
    """
    ranks = {(group.size, group.rank) for group in groups if group.rank is not None and group.size > 1}
    found = {}
    for node in gm.graph.nodes if ranks else ():
        parts = node_value(node)
        if operator_name(node) not in _SPLITS or not isinstance(parts, (tuple, list)):
            continue
        taken = {user.args[1] if user.target is operator.getitem else None for user in node.users}
        if len(taken) == 1 and (len(parts), next(iter(taken))) in ranks:
            found[node] = len(parts)
    return found
