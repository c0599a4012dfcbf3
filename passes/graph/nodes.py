"""What a node of an FX graph is: the name of its operator, its arguments by name, its shape, the module it is from."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.graph.values import node_value

__all__ = [
    "bind_arguments",
    "is_bool",
    "is_projected",
    "is_written",
    "may_write",
    "module_path",
    "operator_name",
    "shape_of",
    "users_of",
]


def operator_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "softmax" for torch.softmax, aten.softmax.int and Tensor.softmax alike."""
    target = node.target
    if isinstance(target, str):
        return target if node.op == "call_method" else ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", "")


def bind_arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a call by name, whether given by position or by keyword. Those not given are missing.

    Operators of a library bring their schema; ``names`` are the positional names of everything else.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        names = tuple(argument.name for argument in target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape of the tensor that a node yields (ints and SymInts); None if it yields no tensor."""
    value = node_value(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def is_bool(node: fx.Node) -> bool:
    """Whether a node yields a bool tensor."""
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def users_of(node: fx.Node) -> set[fx.Node]:
    """The nodes that use the value of a node; torch.export's assertions about its metadata do not count."""
    return {user for user in node.users if operator_name(user) != "_assert_tensor_metadata"}


_WRITES = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"})
_VIEWS = frozenset(
    {"view", "reshape", "expand", "unflatten", "flatten", "unsqueeze", "squeeze", "transpose", "permute"}
)
_VIEWS |= {"__getitem__", "getitem", "select", "slice", "narrow", "detach", "alias", "chunk", "split", "unbind", "t"}


def may_write(user: fx.Node) -> bool:
    """Whether a node writes to its first argument: an assignment, iadd ..., an operator whose name ends in _."""
    name = operator_name(user)
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def is_written(node: fx.Node) -> bool:
    """Whether some node writes to a tensor in place, directly or through a view of it."""
    return any(
        (user.args[:1] == (node,) and may_write(user)) or (operator_name(user) in _VIEWS and is_written(user))
        for user in node.users
    )


_CONTRACTIONS = frozenset(
    {
        "linear",
        "matmul",
        "__matmul__",
        "bmm",
        "mm",
        "addmm",
        "baddbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
    }
)


def is_projected(node: fx.Node) -> bool:
    """Whether some matrix product or convolution lies between the inputs of the graph and a node."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in ("call_function", "call_method") and operator_name(current) in _CONTRACTIONS:
            return True
        waiting.extend(current.all_input_nodes)
    return False


# How Dynamo gets at a module whose forward other libraries have wrapped: through their hooks, not through the model.
_HOOK_PARTS = frozenset({"forward", "fn_ref", "original_forward", "_old_forward", "__wrapped__", "_orig_mod"})
# A hook of diffusers' that is one with the function it stands in for.
_CLOSURE = re.compile(r"\.func\.__closure__\.\d+\.cell_contents")
_INDEX = re.compile(r"\[['\"]?(\w+)['\"]?\]")


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced in, such as "blocks.3.attn1"; the node's name if there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return node.name
    path = entries[-1][0] if isinstance(entries[-1], tuple) else str(entries[-1])
    # Dynamo writes how it got at the module: L['self'].__dict__['_modules']['blocks'].0.attn1, L['fn'].__self__ ...
    path = re.sub(r"^L\[['\"]\w+['\"]\]", "", path)
    path = path.replace("__self__", "").replace("__dict__['_modules']", "").replace("_modules", "")
    path = _CLOSURE.sub("", _INDEX.sub(r".\1", path))
    parts = [part for part in path.split(".") if part and part not in _HOOK_PARTS]
    return ".".join(parts) or node.name
