"""How an exported program is called: from (args, kwargs) to the flat inputs of its graph, checked, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from svg2_compile.export.conditions import read_conditions
from svg2_compile.export.errors import ExportError
from svg2_compile.passes.graph.sizes import solve_for_symbol

__all__ = ["CallSignature", "Leaf"]


@dataclass(frozen=True)
class Leaf:
    """One flat input.

    name: readable path, such as "image_rotary_emb[0]". node: its name in the graph. example: a fake tensor, a symbolic
    number, or the constant that it was.
    """

    name: str
    node: str
    example: Any

    @property
    def is_constant(self) -> bool:
        """Whether the value was fixed at export."""
        return not isinstance(self.example, (torch.Tensor, torch.SymInt, torch.SymFloat))


class CallSignature:
    """The inputs and outputs of an exported program.

    Args:
        program: a program whose last inputs are the user's.
        conditions: source of what it assumes of sizes; None takes the program's own.

    Attributes:
        leaves: the flat inputs; those that are no constants are inputs of the graph.
        conditions: source texts, to be saved.
    """

    def __init__(self, program: ExportedProgram, conditions: Sequence[str] | None = None) -> None:
        in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        if in_spec is None or out_spec is None:
            raise ExportError("exported_program: it does not tell how it is called (no input or output structure).")
        self._in_spec: pytree.TreeSpec = in_spec
        self._out_spec: pytree.TreeSpec = out_spec
        positional, by_name = in_spec.children()
        entry = program.module_call_graph[0].signature
        names = list(entry.forward_arg_names or []) if entry is not None else []
        keywords: list[str] = list(by_name.context or [])
        self._names = names[: positional.num_children] + [
            f"argument {index}" for index in range(len(names), positional.num_children)
        ]
        self._keywords = keywords
        self._parts = dict(zip(self._names + keywords, positional.children() + by_name.children(), strict=True))
        paths = [f"['{name}']{rest}" for name, part in self._parts.items() for rest in _paths(part)]
        self.leaves = [
            Leaf(_readable(path), node.name, node.meta.get("val"))
            for path, node in zip(paths, _user_inputs(program), strict=True)
        ]
        self.conditions = list(getattr(program, "_guards_code", ()) if conditions is None else conditions)
        self._conditions = read_conditions(self.conditions, paths)
        self._ranges = dict(program.range_constraints)

    @property
    def argument_names(self) -> list[str]:
        """The names of the arguments, first those that were given by position at export."""
        return list(self._parts)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs of the graph, checked: tensors and numbers, without the constants.

        Arguments may be given by position or by name, whichever way they were at export; those that were constants may
        be left out.

        Raises:
            ExportError: an argument is missing, unknown, of another structure, type, shape, dtype or device.
        """
        given = self._by_name(args, kwargs)
        values: list[Any] = []
        for name, part in self._parts.items():
            if name in given:
                values += self._flatten_part(name, part, given[name])
            else:
                values += self._constants_of(name, part, len(values))
        self._check(values)
        return [value for value, leaf in zip(values, self.leaves, strict=True) if not leaf.is_constant]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The flat outputs of the graph in the structure that the exported model returned."""
        return pytree.tree_unflatten(list(outputs), self._out_spec)

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._names):
            raise ExportError(
                f"args: {len(args)} given, exported with {len(self._names)} by position. Valid by name: "
                f"{', '.join(self._parts)}."
            )
        given = dict(zip(self._names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ExportError(f"{name}: given by position and by name. Valid: one of them.")
            if name not in self._parts:
                raise ExportError(
                    f"{name}: the program was exported without this argument, so it cannot change. Valid: "
                    f"{', '.join(self._parts)}."
                )
            given[name] = value
        return given

    def _flatten_part(self, name: str, part: pytree.TreeSpec, value: Any) -> list[Any]:
        leaves, structure = pytree.tree_flatten(value)
        if _shape_of(structure) != _shape_of(part):
            raise ExportError(f"{name}: has the structure {_shape_of(structure)}. Valid: {_shape_of(part)}.")
        if structure.type is dict and list(structure.context) != list(part.context):
            leaves = pytree.tree_leaves({key: value[key] for key in part.context})
        return leaves

    def _constants_of(self, name: str, part: pytree.TreeSpec, start: int) -> list[Any]:
        leaves = self.leaves[start : start + part.num_leaves]
        if not all(leaf.is_constant for leaf in leaves):
            raise ExportError(f"{name}: missing. Valid: every one of {', '.join(self._required())}.")
        return [leaf.example for leaf in leaves]

    def _required(self) -> list[str]:
        return list(dict.fromkeys(leaf.name.split("[")[0] for leaf in self.leaves if not leaf.is_constant))

    def _check(self, values: Sequence[Any]) -> None:
        sizes: dict[sympy.Symbol, int] = {}
        for leaf, value in zip(self.leaves, values, strict=True):
            if leaf.is_constant:
                if type(value) is not type(leaf.example) or value != leaf.example:
                    raise ExportError(
                        f"{leaf.name}={value!r}: the value was fixed at export. Valid: {leaf.example!r}, or export "
                        "again with the other value."
                    )
            elif isinstance(leaf.example, torch.Tensor):
                _check_tensor(leaf, value, sizes, self._ranges)
            elif not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ExportError(f"{leaf.name}={value!r} is no number. Valid: {leaf.example}.")
            else:
                _check_size(leaf, leaf.example, value, "value", sizes, self._ranges)
        for condition in self._conditions:
            if not condition.holds(values):
                raise ExportError(f"input sizes: the program was exported on the assumption that {condition.text}.")


def _user_inputs(program: ExportedProgram) -> list[fx.Node]:
    placeholders: list[fx.Node] = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    return [node for node, spec in zip(placeholders, specs, strict=True) if spec.kind == InputKind.USER_INPUT]


def _paths(part: pytree.TreeSpec) -> list[str]:
    tree = pytree.tree_unflatten(list(range(part.num_leaves)), part)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _readable(path: str) -> str:
    name, _, rest = path.removeprefix("['").partition("']")
    return name + rest


def _shape_of(spec: pytree.TreeSpec) -> str:
    """A structure as text; the order of a dict's keys does not count."""
    if spec.is_leaf():
        return "*"
    keys = sorted(map(str, spec.context)) if spec.type is dict else spec.context
    children = spec.children()
    if spec.type is dict:
        children = [child for _, child in sorted(zip(map(str, spec.context), children, strict=True))]
    inner = ", ".join(_shape_of(child) for child in children)
    return f"{spec.type.__name__}{'' if keys is None else keys}({inner})"


def _check_tensor(leaf: Leaf, value: Any, sizes: dict[sympy.Symbol, int], ranges: Mapping[Any, Any]) -> None:
    expected = leaf.example
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"{leaf.name}: {type(value).__name__} given. Valid: {_describe(expected)}.")
    if value.dtype != expected.dtype or value.dim() != expected.dim() or not _same_device(value, expected):
        raise ExportError(f"{leaf.name}: {_describe(value)} given. Valid: {_describe(expected)}.")
    if value.requires_grad and torch.is_grad_enabled():
        raise ExportError(
            f"{leaf.name}: requires a gradient, but the program is for inference. Valid: call it under "
            "torch.no_grad(), or detach the tensor."
        )
    for dim, (size, wanted) in enumerate(zip(value.shape, expected.shape, strict=True)):
        _check_size(leaf, wanted, size, f"shape[{dim}]", sizes, ranges)


def _check_size(
    leaf: Leaf, wanted: Any, size: Any, what: str, sizes: dict[sympy.Symbol, int], ranges: Mapping[Any, Any]
) -> None:
    """Compare one size with the int or symbol that it must be; learn the symbol's value where it is new."""
    if isinstance(wanted, (int, float)):
        if size != wanted:
            raise ExportError(f"{leaf.name}: {what} is {size}. Valid: {wanted} (fixed at export).")
        return
    expression = wanted.node.expr
    if not expression.free_symbols <= set(sizes):
        solved = solve_for_symbol(expression)
        if solved is None:
            return  # a relation between several symbols: the program itself looks at it
        symbol, factor, offset = solved
        sizes[symbol] = (size - offset) // factor
        allowed = ranges.get(symbol)
        if allowed is not None and not (allowed.lower <= sizes[symbol] <= allowed.upper):
            lower, upper = (expression.xreplace({symbol: end}) for end in (allowed.lower, allowed.upper))
            raise ExportError(f"{leaf.name}: {what} is {size}. Valid: {lower} to {upper}.")
    known = expression.xreplace({symbol: sympy.Integer(number) for symbol, number in sizes.items()})
    if known != size:
        raise ExportError(f"{leaf.name}: {what} is {size}. Valid: {known}, which is {expression} of this call.")


def _same_device(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return value.device.type == expected.device.type and (value.device.index or 0) == (expected.device.index or 0)


def _describe(tensor: torch.Tensor) -> str:
    shape = ", ".join(str(size) for size in tensor.shape)
    return f"a tensor [{shape}] of {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
