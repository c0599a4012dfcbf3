"""One graph as JSON and back. The only module that knows PyTorch's serialiser, which is not public.

PyTorch's own files (``torch.export.save``) hold a second copy of the weights for every graph, and reading one may
unpickle. So the graph alone is taken through its JSON schema, without weights and example inputs.

That schema is read by looking names up (operators in ``torch``, types in a registry) and by evaluating expressions.
What a stranger's file may name is therefore checked here first, against what a graph needs.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions as torch_functions

from svg2_compile.export.errors import ExportError
from svg2_compile.passes.graph.sizes import size_hints, solve_for_symbol
from svg2_compile.passes.graph.values import fake_mode_of

try:
    from torch._export.serde.schema import ScalarType
    from torch._export.serde.serialize import (
        _SERIALIZE_TO_TORCH_DTYPE,
        _SYM_OPS,
        SerializedArtifact,
        deserialize,
        serialize,
    )
except ImportError as problem:  # pragma: no cover - a PyTorch that moved it
    raise ImportError(
        f"svg2_compile saves graphs with PyTorch's serialiser, which PyTorch {torch.__version__} does not have in "
        "torch._export.serde.serialize. Tested: 2.11 and 2.13."
    ) from problem

__all__ = ["expression_from_text", "graph_from_json", "graph_to_json", "shape_text"]

# What describes where a node came from in the user's code; the module path alone is kept.
_KEPT_METADATA = frozenset({"nn_module_stack"})
# Packages whose output types are found by importing the module that the type's name gives.
_PACKAGES_OF_TYPES = ("diffusers", "transformers")
_SIZE_OPERATORS = frozenset(f"{op.__module__}.{op.__name__}" for op in _SYM_OPS)
# It opens a file by name.
_FORBIDDEN_OPERATORS = frozenset({"from_file"})
_WORD = re.compile(r"\w+")
_EXPRESSION_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.USub),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.Tuple),
)


def graph_to_json(program: ExportedProgram) -> bytes:
    """The graph and signature of a program, without its weights.

    Raises:
        ExportError: the program holds what the schema cannot express.
    """
    shell = copy.copy(program)
    # The serialiser wants weights to check and to pickle: without data they cost nothing.
    shell._state_dict = {name: _without_data(value) for name, value in program.state_dict.items()}
    shell._constants = {name: _without_data(value) for name, value in program.constants.items()}
    shell._example_inputs = None
    shell._guards_code = []  # source code; the call signature keeps the conditions
    try:
        data = json.loads(serialize(shell).exported_program)
    except Exception as error:
        raise ExportError(f"program: PyTorch cannot serialise its graph: {type(error).__name__}: {error}") from error
    for metadata in _metadata(data):
        for key in set(metadata) - _KEPT_METADATA:
            del metadata[key]
    _drop_unused_ranges(data)
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def graph_from_json(data: bytes, state: Mapping[str, Any], constants: Mapping[str, Any]) -> ExportedProgram:
    """The program with the graph in ``data`` and the tensors given.

    Raises:
        ExportError: the graph names an operator or type that is not there, or one that no graph needs.
    """
    content = json.loads(data)
    _check(content)
    artifact = SerializedArtifact(data, dict(state), dict(constants), b"")  # type: ignore[arg-type]
    try:
        program = deserialize(artifact)
    except Exception as error:
        raise ExportError(
            f"file: PyTorch {torch.__version__} cannot read its graph, saved with PyTorch "
            f"{content.get('torch_version')}: {type(error).__name__}: {error}"
        ) from error
    _repair_hints(program)
    return program


def _repair_hints(program: ExportedProgram) -> None:
    """PyTorch notes example sizes of whole expressions in reading, where compilers expect those of symbols."""
    shape_env = fake_mode_of(program.graph_module).shape_env
    if shape_env is None:
        return
    known = size_hints(shape_env)
    for expression in [key for key in known if not isinstance(key, sympy.Symbol)]:
        value = known.pop(expression)
        solved = solve_for_symbol(expression)
        if solved is not None:
            symbol, factor, offset = solved
            known.setdefault(symbol, (value - offset) // factor)


def shape_text(meta: Mapping[str, Any]) -> str:
    """The dtype and shape of a value as the schema notes it: "float32 [1, 2, s0]"."""
    dtype = _SERIALIZE_TO_TORCH_DTYPE.get(ScalarType(meta["dtype"]))
    sizes = [
        str(expression_from_text(s["as_expr"]["expr_str"])) if "as_expr" in s else str(s["as_int"])
        for s in meta["sizes"]
    ]
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def _without_data(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"program: a constant of type {type(value).__name__} cannot be saved. Valid: tensors.")
    empty = torch.empty_like(value, device="meta")
    return torch.nn.Parameter(empty, value.requires_grad) if isinstance(value, torch.nn.Parameter) else empty


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in ``value``."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _metadata(data: Any) -> Iterator[dict[str, Any]]:
    for item in _dictionaries(data):
        if isinstance(item.get("target"), str) and isinstance(item.get("metadata"), dict):
            yield item["metadata"]


def _drop_unused_ranges(data: dict[str, Any]) -> None:
    """Symbols that tracing made and no value of the graph has: PyTorch would warn of each in reading."""
    used = set()
    for item in _dictionaries(data["graph_module"]):
        if "expr_str" in item:
            used |= set(_WORD.findall(item["expr_str"]))
    data["range_constraints"] = {name: span for name, span in data["range_constraints"].items() if name in used}


def expression_from_text(text: str) -> sympy.Expr:
    """An expression over sizes, as ``sympy.srepr`` writes it.

    Raises:
        ExportError: it is something else.
    """
    _check_expression(text)
    names = {name: getattr(torch_functions, name) for name in dir(torch_functions) if _is_mathematical(name)}
    return sympy.sympify(text, locals=names)


def _check(data: Any) -> None:
    if not isinstance(data, dict) or data.get("guards_code"):
        raise ExportError("file: its graph carries source code. Valid: a graph as svg2_compile.save writes it.")
    for item in _dictionaries(data):
        if isinstance(item.get("target"), str) and "inputs" in item:
            _check_operator(item["target"])
            if set(item.get("metadata", {})) - _KEPT_METADATA:
                raise ExportError("file: its graph carries metadata that svg2_compile.save does not write.")
        if "expr_str" in item:
            _check_expression(item["expr_str"])
        for name in ("in_spec", "out_spec"):
            if isinstance(item.get(name), str):
                _check_structure(json.loads(item[name])[1])


def _check_operator(target: str) -> None:
    """Operators of the dispatcher, and arithmetic on sizes."""
    if target in _SIZE_OPERATORS:
        return
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5) and parts[3] not in _FORBIDDEN_OPERATORS:
        namespace, name, *overload = parts[2:]
        found = getattr(getattr(torch.ops, namespace), name, None)
        found = getattr(found, overload[0], None) if overload and found is not None else found
        if isinstance(found, torch._ops.OperatorBase):
            return
        raise ExportError(
            f"file: its operator {namespace}::{name} is not in this process. Valid: import the library that "
            f"registers {namespace} first (PyTorch {torch.__version__}; svg2 operators: update svg2_compile)."
        )
    raise ExportError(f"file: its graph calls {target!r}. Valid: registered operators and arithmetic on sizes.")


def _check_expression(text: str) -> None:
    """Arithmetic over symbols, in the constructors of sympy; PyTorch hands the text to sympy, which evaluates it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ExportError(f"file: {text[:80]!r} is no expression over sizes.") from error
    for node in ast.walk(tree):
        known = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Constant):
            known = isinstance(node.value, (int, float)) or (isinstance(node.value, str) and node.value.isidentifier())
        elif isinstance(node, ast.Name):
            known = _is_mathematical(node.id)
        if not known:
            raise ExportError(f"file: {text[:80]!r} is no expression over sizes.")


def _is_mathematical(name: str) -> bool:
    if name.startswith("_"):
        return False
    found = getattr(torch_functions, name, None) or getattr(sympy, name, None)
    return isinstance(found, sympy.Basic) or (inspect.isclass(found) and issubclass(found, sympy.Basic))


def _check_structure(spec: Any) -> None:
    """A tree of containers: types that are registered, and contexts that name no other."""
    name, context = spec["type"], spec["context"]
    if name is not None:
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            _import_type(name)
        if "default_factory" in json.dumps(context) or "__enum__" in json.dumps(context):
            raise ExportError(f"file: a {name} with the context {context!r} is not accepted as input or output.")
    for child in spec["children_spec"]:
        _check_structure(child)


def _import_type(name: str) -> None:
    """Make a type of a known library register itself."""
    module, _, _ = name.rpartition(".")
    if module.split(".")[0] in _PACKAGES_OF_TYPES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ExportError(f"file: its inputs or outputs have the type {name}, but: {error}") from error
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise ExportError(
            f"file: its inputs or outputs have the type {name}, which is not registered in this process. Valid: import "
            "the module that registers it first, or export with return_dict=False."
        )
