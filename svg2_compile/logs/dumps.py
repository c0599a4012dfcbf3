"""Graphs before and after every pass, as readable Python files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import fx

__all__ = ["dump_graph"]


def dump_graph(
    dump_dir: str | os.PathLike[str] | None, index: int, pass_name: str, gm: fx.GraphModule, when: str
) -> Path | None:
    """Write a graph as readable Python to ``dump_dir/NN_pass.before.py`` (or ``.after.py``).

    The file appears whole or not at all, so that somebody who reads while a model compiles never sees half a graph.

    Args:
        dump_dir: made if missing; None writes nothing.
        index: position of the pass in the pipeline, from 0.
        when: "before" or "after".

    Returns:
        The path written; None if ``dump_dir`` is None.

    Raises:
        ValueError: if ``when`` is neither.
    """
    if when not in ("before", "after"):
        raise ValueError(f"when={when!r} is not valid. Valid: 'before', 'after'.")
    if dump_dir is None:
        return None
    directory = Path(dump_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{index:02d}_{pass_name}.{when}.py"
    text = gm.print_readable(print_output=False, include_stride=False, include_device=False)
    _write_atomically(path, text + "\n")
    return path


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
