"""The bodies of ``svg2 transform``, ``svg2 package`` and, for saved programs, ``svg2 inspect``."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from svg2_compile.export.aoti import package
from svg2_compile.export.archive import is_archive
from svg2_compile.export.errors import ExportError
from svg2_compile.export.file import load, save
from svg2_compile.export.inspect_file import FileFacts, draw_site, inspect_file
from svg2_compile.export.transform import transform
from svg2_compile.export.transformed import TransformedProgram

__all__ = ["inspect_command", "package_command", "read_exported", "transform_command"]


def transform_command(model: Path, output: Path, options: Mapping[str, Any]) -> FileFacts:
    """Transform a file of ``torch.export.save`` and save the result; says what is in it.

    Raises:
        ExportError: the file is no exported program, or cannot be transformed.
        ConfigError: an option is not valid.
    """
    program: ExportedProgram | TransformedProgram = load(model) if is_archive(model) else read_exported(model)
    save(transform(program, **options), output)  # type: ignore[arg-type]  # one transformed before comes back as it is
    return inspect_file(output)


def package_command(model: Path, output: Path) -> FileFacts:
    """Compile both graphs of a saved program ahead of time.

    Raises:
        ExportError: the file is no saved program, or Inductor cannot compile here.
    """
    package(load(model), output)
    return inspect_file(output)


def inspect_command(model: Path, graph: Path | None = None, site: int = 0) -> FileFacts:
    """What a saved program says about itself; also draws one rewritten attention if ``graph`` is given.

    Raises:
        ExportError: the file is damaged or none of ours, or there is no such attention.
    """
    facts = inspect_file(model)
    if graph is not None:
        draw_site(model, site, graph)
    return facts


def read_exported(path: Path) -> ExportedProgram:
    """Read a file of ``torch.export.save``. PyTorch may unpickle in reading: open only files that you trust.

    Raises:
        ExportError: the file is missing or is no exported program.
    """
    if not path.is_file():
        raise ExportError(f"MODEL: there is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise ExportError(f"MODEL: {path} is not an exported program: it is no zip archive, or is truncated.")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ExportError(
            f"MODEL: {path} is not an exported program of this PyTorch ({torch.__version__}): "
            f"{type(error).__name__}: {error}"
        ) from error
