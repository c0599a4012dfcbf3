"""The offline door: an exported program goes through the same passes as a graph of Dynamo's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from svg2_compile.export.errors import ExportError
from svg2_compile.export.transformed import TimeSource, TransformedProgram
from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.attention.find import find_attention
from svg2_compile.passes.device_profile import DeviceProfile
from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.graph.nodes import bind_arguments, module_path
from svg2_compile.passes.graph.values import graph_device
from svg2_compile.passes.hoist_centroids import StateSpec
from svg2_compile.pipeline import PIPELINE, Compilation, Pass, run_passes
from svg2_compile.reporting.describe import describe
from svg2_compile.settings.config import Svg2Config

__all__ = ["run_on_program", "transform"]

log = get_logger()

# Regions that run_decompositions({}) dissolves; it leaves everything else as it is.
_REGIONS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})


def transform(exported_program: ExportedProgram, **options: Any) -> TransformedProgram:
    """Rewrite the attentions over video tokens of an exported program into SVG2 sparse attention.

    Args:
        exported_program: of ``torch.export.export``, before or after ``run_decompositions()``. It is not changed, and
            its weights are shared, not copied. What was transformed already is returned as it is.
        **options: the fields of Svg2Config.

    Returns:
        A program to call in a denoising loop, or to give to ``svg2_compile.save`` and ``svg2_compile.package``.

    Raises:
        TypeError: ``exported_program`` is something else.
        ConfigError: an option is unknown or out of range.
        ExportError: the program has no attention, is for training, or has been rewritten before.
    """
    if isinstance(exported_program, TransformedProgram):
        return _transformed_already(exported_program, options)
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"exported_program: expected a torch.export.ExportedProgram, got {type(exported_program).__name__}. "
            "torch.export.export(model, args, kwargs) makes one of a module."
        )
    config = Svg2Config.from_options(options)
    _check_program(exported_program)
    dense = _opened(exported_program)
    c = run_on_program(dense, config)
    if not c.calls and not c.unreadable:
        raise ExportError(
            f"exported_program: no attention among its {len(c.gm.graph.nodes)} operations. Valid: a program that "
            "computes scaled_dot_product_attention, or softmax(q @ k) @ v, at the top level of its graph."
        )
    sparse = _rewritten(dense, c.gm, c.spec) if c.spec is not None else None
    sites = describe(c.decisions, config=config, device=c.device)
    transformed = TransformedProgram(
        *(c.name, dense, sparse, c.spec, config, sites, TimeSource("none", ())),
        graph_report=c.graph_report(),
        worths=c.worths,
    )
    names = {leaf.node: leaf.name for leaf in transformed.signature.leaves}
    transformed.time = TimeSource(c.time_kind, tuple(names[found.name] for found in c.time_inputs))
    if sparse is None:
        reasons = {site.reason: site.detail for site in transformed.sites}
        log.warning("%r: %s", transformed, "; ".join(f"{reason} ({detail})" for reason, detail in reasons.items()))
    return transformed


def _transformed_already(program: TransformedProgram, options: Mapping[str, Any]) -> TransformedProgram:
    wanted = Svg2Config.from_options(options) if "preset" in options else program.config.replace(**options)
    if wanted != program.config:
        before, after = program.config.to_dict(), wanted.to_dict()
        changes = ", ".join(
            f"{name}={before[name]!r} -> {after[name]!r}" for name in before if before[name] != after[name]
        )
        raise ExportError(
            f"exported_program: is transformed already, with other options ({changes}). Valid: the same options; or "
            "svg2_compile.transform(program.dense, ...), the program as it was before."
        )
    log.warning("%r is transformed already: nothing to do", program)
    return program


def run_on_program(
    program: ExportedProgram,
    config: Svg2Config,
    passes: tuple[Pass, ...] = PIPELINE,
    target: tuple[torch.device, DeviceProfile] | None = None,
) -> Compilation:
    """Run passes on a copy of a program's graph, weights shared; ``target``: to decide for, None is its own device."""
    gm = copy_graph_module(program.graph_module)
    weights = frozenset(name for name, spec in _inputs(program) if spec.kind != InputKind.USER_INPUT)
    name = next((path for path in map(_class_name, program.graph.nodes) if path), "program")
    device, profile = target or (graph_device(gm), None)
    return run_passes(Compilation(gm, config, device, name=name, parameters=weights, profile=profile), passes)


def _opened(program: ExportedProgram) -> ExportedProgram:
    """The program without the regions that ``torch.no_grad`` and ``torch.autocast`` wrap around attention."""
    wrapped = set()
    for node in program.graph.nodes:
        for source in node.all_input_nodes if isinstance(node.target, torch._ops.HigherOrderOperator) else ():
            region = getattr(program.graph_module, str(source.target), None) if source.op == "get_attr" else None
            if isinstance(region, fx.GraphModule) and any(find_attention(region)):
                wrapped.add(str(node.target))
    if wrapped & _REGIONS:
        program = program.run_decompositions({})
    for kind in wrapped - _REGIONS:
        log.warning("attention inside of %s stays dense: only the top level of a graph is rewritten", kind)
    return program


def _class_name(node: fx.Node) -> str:
    """The class of the exported module, from the first node that was traced in it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not isinstance(stack[0], tuple):
        return ""
    kind = stack[0][1]
    name = (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]
    return "" if name.startswith("_") else name


def _inputs(program: ExportedProgram) -> Iterator[tuple[str, InputSpec]]:
    """Name in the graph and specification of every input."""
    placeholders = program.graph.find_nodes(op="placeholder")
    return ((node.name, spec) for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True))


def _check_program(program: ExportedProgram) -> None:
    if program.graph_signature.backward_signature is not None:
        raise ExportError("exported_program: computes gradients. Valid: a forward pass, of model.eval().")
    for name, value in {**program.state_dict, **program.constants}.items():
        if isinstance(value, FakeTensor):
            raise ExportError(
                f"exported_program: {name} has no values: torch.export lost them, or ran under FakeTensorMode. Valid: "
                "a program that runs, with real weights and constants (try strict=True, or strict=False)."
            )
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace == "svg2":
            raise ExportError(
                f"exported_program: has {node.target} already, so it has been transformed before. Valid: the program "
                "as torch.export.export gave it."
            )
        if _is_training(node):
            raise ExportError(
                f"exported_program: {node.target} in {module_path(node)} is in training mode. Valid: a program "
                "exported after model.eval()."
            )


def _is_training(node: fx.Node) -> bool:
    """Whether an operator behaves as it does in training: drops values, or updates statistics."""
    given = bind_arguments(node, ())
    if "p" in given or "dropout_p" in given:
        probability = given.get("p", given.get("dropout_p"))
        return bool(probability) and given.get("train", True) is not False
    return given.get("training", given.get("train")) is True


def _rewritten(dense: ExportedProgram, gm: fx.GraphModule, spec: StateSpec) -> ExportedProgram:
    """The rewritten graph as an exported program that shares the weights of ``dense``."""
    old = dense.graph_signature
    placeholders = gm.graph.find_nodes(op="placeholder")
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    new_inputs = [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in placeholders[spec.num_inputs :]]
    new_outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(str(node)), None) for node in outputs[spec.num_outputs :]
    ]
    signature = ExportGraphSignature([*old.input_specs, *new_inputs], [*old.output_specs, *new_outputs])
    (iters,) = (node.meta["val"] for node in placeholders if node.name == "svg2_iters")
    ranges = dict(dense.range_constraints)
    if isinstance(iters, torch.SymInt):
        ranges[iters.node.expr] = ValueRanges(1, int_oo)
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=dense.state_dict,
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry("", _flat_call(signature))],
        constants=dense.constants,
        verifiers=dense.verifiers,
    )


def _argument(node: fx.Node) -> Any:
    kind = SymIntArgument if isinstance(node.meta["val"], torch.SymInt) else TensorArgument
    return kind(node.name)


def _flat_call(signature: ExportGraphSignature) -> ModuleCallSignature:
    """How the rewritten program is called: every input by position, every output in one tuple."""
    inputs = [spec.arg for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    outputs = [spec.arg for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    in_spec = pytree.tree_flatten((tuple(inputs), {}), is_leaf=lambda item: item in inputs)[1]
    out_spec = pytree.tree_flatten(tuple(outputs), is_leaf=lambda item: item in outputs)[1]
    return ModuleCallSignature(inputs=inputs, outputs=outputs, in_spec=in_spec, out_spec=out_spec)
