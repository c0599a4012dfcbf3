"""The logger, and things said once.

Logging is the standard library's, under the name ``svg2_compile``, so that PyTorch's own switch controls it:
``TORCH_LOGS="svg2_compile"`` shows decisions, ``TORCH_LOGS="+svg2_compile"`` everything, or in code
``torch._logging.set_logs(modules={"svg2_compile": logging.DEBUG})``. (A registered short name is no way out: PyTorch
rejects names in TORCH_LOGS that are not known when it is imported itself.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["Lazy", "Once", "get_logger", "log"]

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
