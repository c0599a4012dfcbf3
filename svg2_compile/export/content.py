"""The entries of a file that hold a program: both graphs as JSON, and one copy of the weights as bytes."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from svg2_compile.export.archive import ArchiveReader, ArchiveWriter
from svg2_compile.export.errors import ExportError, FileDamaged
from svg2_compile.export.serde import graph_from_json, graph_to_json
from svg2_compile.export.tensors import StoredTensors, restore_tensors
from svg2_compile.export.transformed import TransformedProgram

__all__ = ["DENSE_ENTRY", "SPARSE_ENTRY", "read_graphs", "write_program"]

DENSE_ENTRY, SPARSE_ENTRY = "graphs/dense.json", "graphs/sparse.json"


def write_program(writer: ArchiveWriter, program: TransformedProgram) -> dict[str, Any]:
    """Write graphs and weights; returns what the manifest says of them."""
    stored = StoredTensors({"state": program.dense.state_dict, "constants": program.dense.constants})
    writer.add(DENSE_ENTRY, graph_to_json(program.dense))
    if program.sparse is not None:
        writer.add(SPARSE_ENTRY, graph_to_json(program.sparse))
    for name, data in stored.entries():
        writer.add(name, data, compress=False)
    return {"tensors": stored.index}


def read_graphs(reader: ArchiveReader) -> tuple[ExportedProgram, ExportedProgram | None]:
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
