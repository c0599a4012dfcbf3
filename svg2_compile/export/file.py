"""save and load: a transformed program as one file, weights stored once, nothing in it that runs when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from svg2_compile.export.aoti import packaged_graphs
from svg2_compile.export.archive import ArchiveReader, ArchiveWriter
from svg2_compile.export.content import read_graphs, write_program
from svg2_compile.export.manifest import check_manifest, describe_program, read_facts
from svg2_compile.export.transformed import TransformedProgram, check_transformed

__all__ = ["load", "save"]


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
        **options: run-time options that replace those in the file: init_iters, step_iters, dense_steps,
            dense_last_steps, dense_timesteps, inner_backend, inductor_mode, strict, store_limit_mb, and density where
            heads share one.

    Raises:
        ExportError: there is no such file, it is none of ours, or this installation cannot run it (a newer format or
            PyTorch, a missing operator or device).
        FileDamaged: (an ExportError) it is truncated or not as it was written.
        ConfigError: an option is unknown, out of range, or part of the graphs.
    """
    with ArchiveReader(Path(path)) as reader:
        check_manifest(reader.manifest)
        dense, sparse = read_graphs(reader)
        program = TransformedProgram(dense=dense, sparse=sparse, **read_facts(reader.manifest, sparse))
        if "compiled" in reader.manifest and "inner_backend" not in options:
            program.make_graph = packaged_graphs(reader)
    return program.with_options(options) if options else program
