"""save and load: a transformed program as one file, weights stored once, nothing in it that runs when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from svg2_compile.export.archive import ArchiveReader, ArchiveWriter
from svg2_compile.export.errors import ExportError, FileDamaged
from svg2_compile.export.manifest import check_manifest, describe_program, read_facts
from svg2_compile.export.serde import graph_from_json, graph_to_json
from svg2_compile.export.tensors import StoredTensors, restore_tensors
from svg2_compile.export.transformed import TransformedProgram, check_transformed

__all__ = ["load", "save"]

DENSE_ENTRY, SPARSE_ENTRY = "graphs/dense.json", "graphs/sparse.json"


def save(program: TransformedProgram, path: str | os.PathLike[str]) -> None:
    """Write a transformed program to a file.

    The file appears under its name when it is complete and on the disk; an error or a crash leaves what was there.

    Args:
        program: of ``transform`` or ``load``.
        path: the file to write, by convention with the suffix ``.pt2``.

    Raises:
        TypeError: ``program`` is something else.
        ExportError: it holds what cannot be saved (a tensor without values, a subclass, a custom object), or ``path``
            is no file name in an existing folder.
    """
    check_transformed(program)
    with ArchiveWriter(Path(path)) as writer:
        writer.finish({**describe_program(program), **write_program(writer, program)})


def load(path: str | os.PathLike[str], **options: Any) -> TransformedProgram:
    """Read a transformed program from a file.

    Nothing of the file is executed or unpickled in reading: graphs are JSON, checked before PyTorch sees them, and
    weights are bytes. All checksums are verified.

    Args:
        path: a file of ``save`` or ``package``.
        **options: run-time options that replace those in the file: init_iters, step_iters, dense_steps, inner_backend,
            inductor_mode, strict, store_limit_mb.

    Raises:
        ExportError: there is no such file, it is none of ours, or this installation cannot run it (a newer format or
            PyTorch, a missing operator or device).
        FileDamaged: (an ExportError) it is truncated or not as it was written.
        ConfigError: an option is unknown, out of range, or part of the graphs.
    """
    with ArchiveReader(Path(path)) as reader:
        check_manifest(reader.manifest)
        dense, sparse = _read_graphs(reader)
        program = TransformedProgram(dense=dense, sparse=sparse, **read_facts(reader.manifest, sparse))
        if "compiled" in reader.manifest and "inner_backend" not in options:
            from svg2_compile.export.aoti import packaged_graphs

            program.make_graph = packaged_graphs(reader)
    return program.with_options(options) if options else program


def write_program(writer: ArchiveWriter, program: TransformedProgram) -> dict[str, Any]:
    """Write graphs and weights; returns what the manifest says of them."""
    stored = StoredTensors({"state": program.dense.state_dict, "constants": program.dense.constants})
    writer.add(DENSE_ENTRY, graph_to_json(program.dense))
    if program.sparse is not None:
        writer.add(SPARSE_ENTRY, graph_to_json(program.sparse))
    for name, data in stored.entries():
        writer.add(name, data, compress=False)
    return {"tensors": stored.index}


def _read_graphs(reader: ArchiveReader) -> tuple[ExportedProgram, ExportedProgram | None]:
    """The dense and the sparse program of a file, on one set of weights."""
    # All bytes are read, and so verified, before anything is made of them.
    graphs = {name: reader.read(name) for name in (DENSE_ENTRY, SPARSE_ENTRY) if name in reader.manifest["entries"]}
    try:
        tensors = restore_tensors(reader.manifest["tensors"], reader.size, reader.read_into)
        state, constants = tensors["state"], tensors["constants"]
        dense = graph_from_json(graphs[DENSE_ENTRY], state, constants)
        sparse = graph_from_json(graphs[SPARSE_ENTRY], state, constants) if SPARSE_ENTRY in graphs else None
    except ExportError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise FileDamaged(f"file: it is incomplete: {type(error).__name__}: {error}") from error
    return dense, sparse
