"""Debugging aids: the logger, warn-once and graph dumps.

Logging is the standard library's, under the name ``svg2_compile``, so that PyTorch's own switch controls it:
``TORCH_LOGS="svg2_compile"`` shows decisions, ``TORCH_LOGS="+svg2_compile"`` everything, or in code
``torch._logging.set_logs(modules={"svg2_compile": logging.DEBUG})``. (A registered short name is no way out: PyTorch
rejects names in TORCH_LOGS that are not known when it is imported itself.)
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from torch import fx

__all__ = ["Lazy", "Once", "dump_graph", "get_logger", "log"]

ROOT = "svg2_compile"

log = logging.getLogger(ROOT)


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger of a module of this package, always at or below ``svg2_compile``."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


class Lazy:
    """Text that is made only if it is shown, and then once: ``log.debug("%s", Lazy(lambda: table(report)))``."""

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._text: str | None = None

    def __str__(self) -> str:
        if self._text is None:
            self._text = str(self._make())
        return self._text


class Once:
    """Says each thing once in its own lifetime. Belongs to whatever it speaks for: a program, a pipeline, a process."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or get_logger()
        self._said: set[Hashable] = set()

    def __call__(self, key: Hashable, message: str, *args: Any, level: int = logging.WARNING) -> bool:
        """Log ``message % args`` unless something was said under ``key`` before. Returns whether it was logged."""
        if key in self._said:
            return False
        self._said.add(key)
        self._logger.log(level, message, *args)
        return True

    def warning(self, key: Hashable, message: str, *args: Any) -> bool:
        return self(key, message, *args)

    def info(self, key: Hashable, message: str, *args: Any) -> bool:
        return self(key, message, *args, level=logging.INFO)


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
