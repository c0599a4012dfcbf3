"""What a program exported with dynamic shapes assumes of its inputs' sizes, beyond the range of each.

torch.export notes it as Python source such as ``L['hidden_states'].size()[3] // 2 != 1``. It is evaluated here only
where it is plain arithmetic on sizes of inputs: a file must not bring code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Condition", "read_conditions"]

_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod, ast.USub, ast.Not, ast.And, ast.Or),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Call, ast.Subscript, ast.Attribute),
)
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": max, "min": min}


@dataclass(frozen=True)
class Condition:
    """One assumption. text: readable, with the names of inputs."""

    text: str
    _evaluate: Callable[[Sequence[Any]], bool]

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether it holds for the flat inputs of a call."""
        return self._evaluate(leaves)


def read_conditions(sources: Iterable[str], paths: Sequence[str]) -> list[Condition]:
    """The conditions in ``sources``; those that are more than arithmetic on sizes are left out.

    Args:
        sources: Python expressions over ``L['name']...`` or ``L['flat_args'][i]``.
        paths: the path of every flat input, such as ``['image_rotary_emb'][0]``.
    """
    conditions = (_read(source, paths) for source in sources)
    return [condition for condition in conditions if condition is not None]


def _read(source: str, paths: Sequence[str]) -> Condition | None:
    code = text = source
    # The longest first: ['a'][0] must not be taken for ['a'].
    for index in sorted(range(len(paths)), key=lambda index: -len(paths[index])):
        for spelled in (f"L{paths[index]}", f"L['flat_args'][{index}]"):
            code = code.replace(spelled, f"input_{index}")
            text = text.replace(spelled, _readable(paths[index]))
    try:
        tree = ast.parse(code, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return None
    if not all(_is_arithmetic(node, len(paths)) for node in ast.walk(tree)):
        return None
    compiled = compile(tree, "<condition>", "eval")

    def evaluate(leaves: Sequence[Any]) -> bool:
        names = {f"input_{index}": leaf for index, leaf in enumerate(leaves)}
        return bool(eval(compiled, {"__builtins__": {}}, {**_FUNCTIONS, **names}))

    return Condition(text, evaluate)


def _readable(path: str) -> str:
    """``['image_rotary_emb'][0]`` -> ``image_rotary_emb[0]``."""
    name, _, rest = path.removeprefix("['").partition("']")
    return name + rest


def _is_arithmetic(node: ast.AST, num_inputs: int) -> bool:
    if not isinstance(node, _ALLOWED):
        return False
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or node.id in {f"input_{index}" for index in range(num_inputs)}
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.Attribute):
        return node.attr == "size" and isinstance(node.value, ast.Name)
    if isinstance(node, ast.Call):
        is_size = isinstance(node.func, ast.Attribute) and not node.args
        return not node.keywords and (is_size or (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS))
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Call) and isinstance(node.slice, ast.Constant)
    return True
