"""package: a program with both graphs compiled ahead of time by AOTInductor. Experimental, as AOTInductor is.

A package is a saved file with one more entry: machine code for both graphs, without weights. The weights of the file
are handed to it when it is loaded, so that they exist once, on the disk and in memory. AOTInductor takes tensors only;
the number of k-means iterations is the length of one.
"""

from __future__ import annotations

import operator
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram

from svg2_compile.codegen.inner_backend import inductor_problem
from svg2_compile.export.archive import ArchiveReader, ArchiveWriter
from svg2_compile.export.content import write_program
from svg2_compile.export.errors import ExportError
from svg2_compile.export.graphs import ExportedGraph, flat_module, new_guards
from svg2_compile.export.manifest import describe_program
from svg2_compile.export.serde import expression_from_text
from svg2_compile.export.transformed import MakeGraph, TransformedProgram, check_transformed
from svg2_compile.passes.graph.nodes import bind_arguments
from svg2_compile.passes.graph.values import fake_mode_of, graph_device, input_values
from svg2_compile.settings.config import Svg2Config

__all__ = ["package", "packaged_graphs"]

_ENTRY = "compiled.pt2"
_OPTIONS = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}


def package(program: TransformedProgram, path: str | os.PathLike[str]) -> None:
    """Compile both graphs ahead of time and write them to a file, with all that ``save`` writes.

    Experimental. ``svg2_compile.load`` reads the file; it runs on machines like this one, with this PyTorch. A package
    holds machine code: load only packages that you trust.

    Args:
        program: of ``transform`` or ``load``.
        path: the file to write, by convention with the suffix ``.pt2``.

    Raises:
        TypeError: ``program`` is something else.
        ExportError: Inductor cannot compile here, the program cannot be packaged, or ``path`` is no file name in an
            existing folder.
    """
    check_transformed(program)
    gm = flat_module(program.dense)
    _check_program(program, gm)
    device = graph_device(gm)
    problem = inductor_problem(device.type)
    if problem is not None:
        raise ExportError(f"program: AOTInductor cannot compile for {device.type} here: {problem}.")
    writer = ArchiveWriter(Path(path))
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled.pt2"
        assumed = _compile(program, compiled)
        code = compiled.read_bytes()
    with writer:
        tensors = write_program(writer, program)
        writer.add(_ENTRY, code)
        made_for = {"torch": _torch_release(), "machine": _machine(device.type)}
        writer.finish({**describe_program(program), **tensors, "compiled": {**made_for, "assumed": assumed}})


def packaged_graphs(reader: ArchiveReader) -> MakeGraph:
    """What makes the graphs of a package.

    Raises:
        ExportError: its machine code was made for another PyTorch or another kind of machine.
    """
    compiled = reader.manifest["compiled"]
    _check_machine(compiled)
    code = reader.read(_ENTRY)
    assumed = {which: [expression_from_text(text) for text in texts] for which, texts in compiled["assumed"].items()}

    def make(which: str, program: ExportedProgram, config: Svg2Config) -> PackagedGraph:
        weights = {**program.state_dict, **program.constants}
        return PackagedGraph(flat_module(program), config, lambda: _load(code, which, weights), assumed[which])

    return make


class PackagedGraph(ExportedGraph):
    """A graph whose machine code comes from a package.

    Args:
        gm: the graph that was compiled; runs itself where the code's assumptions do not hold.
        config: settings.
        load: yields the compiled function.
        assumed: what the compiler assumed of symbolic sizes.
    """

    def __init__(
        self, gm: fx.GraphModule, config: Svg2Config, load: Callable[[], Callable[..., Any]], assumed: Sequence[Any]
    ) -> None:
        super().__init__(gm, config)
        self._load = load
        self._known = list(assumed)
        self._lengths: dict[int, torch.Tensor] = {}

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        run = self._load()
        self._assumed = self._known
        outputs = _outputs(gm)

        def call(*args: Any) -> tuple[Any, ...]:
            tensors = iter(run([self._length(arg) if isinstance(arg, int) else arg for arg in args]))
            return tuple(next(tensors) if isinstance(item, fx.Node) else item for item in outputs)

        return call

    def _length(self, number: int) -> torch.Tensor:
        if number not in self._lengths:
            device = next(value.device for value in input_values(self.gm) if isinstance(value, torch.Tensor))
            self._lengths[number] = torch.empty(number + 1, dtype=torch.uint8, device=device)
        return self._lengths[number]


def _check_program(program: TransformedProgram, gm: fx.GraphModule) -> None:
    """``gm`` is the program's dense graph."""
    for leaf in program.signature.leaves:
        if not leaf.is_constant and not isinstance(leaf.example, torch.Tensor):
            raise ExportError(f"program: {leaf.name} is a number that may change; AOTInductor takes tensors only.")
    changed = sorted({str(base.target) for node in gm.graph.nodes for base in _written(node) if base.op == "get_attr"})
    if changed:
        raise ExportError(f"program: changes its buffers {changed}, which AOTInductor would do to copies of them.")
    for item in _outputs(gm):
        if isinstance(item, fx.Node) and not isinstance(item.meta.get("val"), torch.Tensor):
            raise ExportError(f"program: returns the number {item.name}; AOTInductor returns tensors only.")


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What an operator writes to: the tensors whose memory its arguments are views of."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    given = bind_arguments(node, ())
    for argument in node.target._schema.arguments:
        base = given.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(base, fx.Node):
            continue
        while isinstance(base.target, torch._ops.OpOverload) and base.target._schema.returns[0].alias_info is not None:
            base = base.all_input_nodes[0]
        yield base


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What a graph returns: nodes, and constants such as None."""
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    return tuple(outputs)


def _compile(program: TransformedProgram, target: Path) -> dict[str, list[str]]:
    """Compile both graphs into one file; returns what was assumed of their sizes."""
    from torch._inductor import aot_compile, list_mode_options
    from torch._inductor.package import package_aoti

    mode = program.config.inductor_mode
    options = {**(list_mode_options(mode) if mode else {}), **_OPTIONS}
    files, assumed = {}, {}
    for which, graph in (("dense", program.dense), ("sparse", program.sparse)):
        if graph is None:
            continue
        gm = _with_tensors_only(flat_module(graph))
        with torch.no_grad(), new_guards(gm) as guards:
            made = aot_compile(gm, tuple(input_values(gm)), options=options)
        assert isinstance(made, list)
        files[which] = made
        assumed[which] = [sympy.srepr(guard) for guard in guards]
    package_aoti(str(target), files)
    return assumed


def _with_tensors_only(gm: fx.GraphModule) -> fx.GraphModule:
    """Constants leave the outputs, and every number among the inputs becomes the length of a tensor less one, in place.

    Less one, because compilers take lengths of one for a special case.
    """
    gm.graph.output_node().args = (tuple(item for item in _outputs(gm) if isinstance(item, fx.Node)),)
    device = next(value.device for value in input_values(gm) if isinstance(value, torch.Tensor))
    for node in gm.graph.find_nodes(op="placeholder"):
        number = node.meta["val"]
        if isinstance(number, torch.Tensor):
            continue
        with gm.graph.inserting_after(node), fake_mode_of(gm):
            tensor = gm.graph.placeholder(f"{node.name}_length")
            tensor.meta["val"] = torch.empty(number + 1, dtype=torch.uint8, device=device)
        with gm.graph.inserting_after(tensor):
            length = gm.graph.call_function(torch.ops.aten.sym_size.int, (tensor, 0))
            length.meta["val"] = number + 1
        with gm.graph.inserting_after(length):
            less_one = gm.graph.call_function(operator.sub, (length, 1))
            less_one.meta["val"] = number
        node.replace_all_uses_with(less_one)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _load(code: bytes, which: str, weights: Mapping[str, Any]) -> Callable[[list[torch.Tensor]], Any]:
    from torch._inductor.package import load_package

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled.pt2"
        path.write_bytes(code)
        model = load_package(str(path), which)
    needed = {name: weights[name] for name in model.get_constant_fqns()}
    # The code reads the program's own tensors: one copy serves both graphs.
    model.load_constants(needed, check_full_update=True, user_managed=True)
    return model.loader.boxed_run


def _check_machine(compiled: Mapping[str, Any]) -> None:
    here = {"torch": _torch_release(), "machine": _machine(compiled["machine"]["device"])}
    for what, found in here.items():
        if compiled[what] != found:
            raise ExportError(
                f"file: its machine code was made for {what} {compiled[what]}, and this is {found}. Valid: the same; "
                "or svg2_compile.load(path, inner_backend='inductor'), which compiles the graphs of the file here."
            )


def _torch_release() -> str:
    """The version without the build."""
    return re.split(r"[+]", str(torch.__version__))[0]


def _machine(device_type: str) -> dict[str, str]:
    """Platform, processor and instruction set, as AOTInductor names them. Code for another may crash the process."""
    from torch._inductor.codecache import get_device_information

    found = {str(key): str(value) for key, value in get_device_information(device_type).items()}
    return {"device": device_type, **found}
