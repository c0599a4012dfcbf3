"""What a saved program says about itself, as JSON: written by save, checked by load, shown by ``svg2 inspect``."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram

from svg2_compile.export.errors import ExportError, FileDamaged
from svg2_compile.export.transformed import TimeSource, TransformedProgram
from svg2_compile.export.worths import describe_worths, read_worths
from svg2_compile.passes.hoist_centroids import BUDGET, StateSlot, StateSpec
from svg2_compile.passes.worth import Worth
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.settings.config import ConfigError, Svg2Config, package_version

__all__ = ["FORMAT_VERSION", "check_manifest", "describe_program", "read_facts", "read_facts_of_manifest"]

FORMAT = "svg2_compile program"
Record = TypeVar("Record", SiteReport, GraphReport)

# Raised when older readers would misread a file. Files of every older version are read.
FORMAT_VERSION = 2
# Settings of the machine that transforms, which mean nothing where the file is loaded.
_LOCAL_OPTIONS = {"dump_dir": None}


def describe_program(program: TransformedProgram) -> dict[str, Any]:
    """The manifest of a program, without weights and entries."""
    graphs = [graph for graph in (program.dense, program.sparse) if graph is not None]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {
            "svg2_compile": package_version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "name": program.name,
        "config": {**program.config.to_dict(), **_LOCAL_OPTIONS},
        "sites": [asdict(site) for site in program.sites],
        "graph_report": asdict(program.graph_report),
        "time": asdict(program.time),
        "state": None if program.spec is None else _describe_spec(program.spec),
        "worths": describe_worths(program.worths),
        "conditions": program.signature.conditions,
        "operators": _operators(graphs),
    }


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse what this installation cannot run.

    Raises:
        ExportError: a newer format, a newer PyTorch, or an operator that is missing or has changed.
    """
    version = manifest.get("format_version")
    if manifest.get("format") != FORMAT or not isinstance(version, int):
        raise FileDamaged("file: its manifest is not that of a program.")
    written_by = manifest.get("versions", {})
    if version > FORMAT_VERSION:
        raise ExportError(
            f"file: has the format version {version}, written by svg2_compile {written_by.get('svg2_compile')}. "
            f"Valid: up to {FORMAT_VERSION}; a newer svg2_compile reads it."
        )
    theirs = str(written_by.get("torch"))
    if _release(theirs) > _release(str(torch.__version__)):
        raise ExportError(
            f"file: saved with PyTorch {theirs}, and this is {torch.__version__}. Valid: the same or a newer minor "
            "version; or export and transform the model with this one."
        )
    _check_operators(manifest.get("operators", {}))


def read_facts(manifest: Mapping[str, Any], sparse: ExportedProgram | None) -> dict[str, Any]:
    """The arguments of TransformedProgram that are no graphs.

    Raises:
        ExportError: the manifest lacks something, or the state specification is not that of the graph.
    """
    facts = read_facts_of_manifest(manifest)
    spec = facts["spec"]
    if (spec is None) != (sparse is None):
        raise FileDamaged("file: it has a state specification without a sparse graph, or the reverse.")
    if sparse is None:
        return facts
    return {**facts, "spec": _checked_spec(spec, sparse), "worths": _read_worths(manifest, facts["config"], sparse)}


def _read_worths(manifest: Mapping[str, Any], config: Svg2Config, sparse: ExportedProgram) -> tuple[Worth, ...]:
    try:
        device = torch.device(manifest["state"]["device"])
        # Older files ask nothing: their sizes were judged when they were written.
        return read_worths(manifest.get("worths", ()), config.min_tokens, device, sparse)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileDamaged(f"file: its manifest is incomplete: {type(error).__name__}: {error}") from error


def read_facts_of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`read_facts`, without comparing the state specification with the graph."""
    try:
        config = Svg2Config.from_options({k: v for k, v in manifest["config"].items() if k != "preset"})
        return {
            "name": str(manifest["name"]),
            "config": config.replace(preset=manifest["config"]["preset"]),
            "spec": None if manifest["state"] is None else _read_spec(manifest["state"]),
            "sites": [_record(SiteReport, site) for site in manifest["sites"]],
            "time": TimeSource(manifest["time"]["kind"], tuple(manifest["time"]["inputs"])),
            "graph_report": _record(GraphReport, manifest["graph_report"]),
            "conditions": [str(condition) for condition in manifest["conditions"]],
        }
    except ConfigError as error:
        raise ExportError(f"file: its configuration is not valid here: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileDamaged(f"file: its manifest is incomplete: {type(error).__name__}: {error}") from error


def _record(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """A record of a report. What a newer version added is left out: reports change no result."""
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in names})


def _describe_spec(spec: StateSpec) -> dict[str, Any]:
    return {
        "slots": [
            {**asdict(slot), "shape": [extent if isinstance(extent, int) else str(extent) for extent in slot.shape]}
            for slot in spec.slots
        ],
        "density_sites": list(spec.density_sites),
        "has_budget": spec.has_budget,
        "error_sites": list(spec.error_sites),
        "num_inputs": spec.num_inputs,
        "num_outputs": spec.num_outputs,
        "device": str(spec.device),
    }


def _read_spec(data: Mapping[str, Any]) -> StateSpec:
    return StateSpec(
        slots=tuple(_read_slot(slot) for slot in data["slots"]),
        density_sites=tuple(data["density_sites"]),
        num_inputs=data["num_inputs"],
        num_outputs=data["num_outputs"],
        device=torch.device(data["device"]),
        # Unknown to version 1.
        has_budget=bool(data.get("has_budget", False)),
        error_sites=tuple(data.get("error_sites", ())),
    )


def _read_slot(data: Mapping[str, Any]) -> StateSlot:
    start = float(data.get("start", 0.0))
    return StateSlot(data["site_index"], data["role"], data["name"], tuple(data["shape"]), start)


def _checked_spec(spec: StateSpec, sparse: ExportedProgram) -> StateSpec:
    """The specification with the shapes of the graph, in the graph's own symbols."""
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in sparse.graph.find_nodes(op="placeholder")}
    slots = []
    for slot in spec.slots:
        value = values.get(slot.name)
        found = tuple(value.shape) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else ()
        if tuple(map(str, found)) != tuple(map(str, slot.shape)):
            raise FileDamaged(
                f"file: the state {slot.name} is {found} in the graph. Valid: float32 {slot.shape}, as its "
                "specification says."
            )
        shape = tuple(extent if isinstance(extent, int) else extent.node.expr for extent in found)
        slots.append(replace(slot, shape=shape))
    if spec.has_budget != (BUDGET in values):
        raise FileDamaged("file: its specification and its graph differ in whether the density is an input.")
    return replace(spec, slots=tuple(slots))


def _operators(graphs: Iterable[ExportedProgram]) -> dict[str, str]:
    """Every operator of the graphs with its schema."""
    found: dict[str, str] = {}
    for graph in graphs:
        for module in graph.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                if isinstance(node.target, torch._ops.OpOverload):
                    found[str(node.target)] = str(node.target._schema)
    return dict(sorted(found.items()))


def _check_operators(operators: Mapping[str, str]) -> None:
    import svg2_compile.kernels.ops  # noqa: F401  (registers the svg2:: operators)

    for name, schema in operators.items():
        namespace, operator, overload = (*str(name).split("."), "", "")[:3]
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        found = getattr(packet, overload, None)
        if found is None:
            raise ExportError(f"file: its operator {name} is not in this process. Valid: {_how_to_get(namespace)}.")
        # PyTorch keeps its own operators compatible; those of this package are compared.
        if namespace == "svg2" and not _takes_calls_of(found._schema, schema):
            raise ExportError(
                f"file: its operator {name} was {schema}, and is {found._schema} here. Valid: the svg2_compile that "
                "wrote the file, or a new transform."
            )


def _takes_calls_of(here: Any, written: str) -> bool:
    """Whether calls of the operator as it was ``written`` mean the same here: it is the same, or has only been given
    more last arguments with defaults, which stand for what it did without them."""
    if str(here) == written:
        return True
    try:
        return bool(here.is_backward_compatible_with(torch._C.parse_schema(written)))
    except RuntimeError:  # not a schema
        return False


def _how_to_get(namespace: str) -> str:
    if namespace == "aten":
        return f"another PyTorch than {torch.__version__}"
    if namespace == "svg2":
        return f"another svg2_compile than {package_version()}"
    return f"import the library that registers {namespace} before loading"


def _release(version: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) where the text is none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
