"""Dynamo while an enabled model runs: its settings, and what it is taught for as long as a call lasts.

Taught are host reads of known numbers (host_reads.py) and looking through torch.compiler.disable (disabled.py). Both
replace methods of Dynamo's and put them back; where a version of Dynamo has no such method, nothing is taught.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from svg2_compile.hosts.disabled import looking_through
from svg2_compile.hosts.host_reads import reading_known_numbers
from svg2_compile.logs.logger import get_logger

__all__ = ["Lesson", "enabled_dynamo_settings", "forgotten_frames"]

log = get_logger()
_lock = threading.RLock()


@dataclass
class Lesson:
    """What Dynamo met while it was taught. looked_through: names of disabled functions that were traced."""

    looked_through: dict[str, None] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    depth: int = 0


_lesson = Lesson()


@contextlib.contextmanager
def enabled_dynamo_settings(look_through: bool = True) -> Iterator[Lesson]:
    """Dynamo's settings while an enabled model runs, as a context manager.

    Some models pick the valid text tokens by a mask (nonzero); without the first setting they fall into eager pieces
    whose attention no compiler sees. Every call of enable or explain adds a cache entry to the forward of a class:
    with the default limit of 8 a long-lived process would silently fall back to eager.

    Warnings and prints are made after the graph that they stand in, rather than between two halves of it.

    look_through: trace functions under torch.compiler.disable as well.
    """
    config = torch._dynamo.config
    patches: dict[str, Any] = {
        "capture_dynamic_output_shape_ops": True,
        "recompile_limit": max(64, config.recompile_limit),
        "reorderable_logging_functions": config.reorderable_logging_functions | {warnings.warn, print},
    }
    with config.patch(patches):
        _begin(look_through)
        try:
            yield _lesson
        finally:
            _end()


@contextlib.contextmanager
def forgotten_frames() -> Iterator[None]:
    """Leave no trace in Dynamo of what is compiled in here.

    A function that Dynamo gave up on is left to eager for good, also when it is compiled anew with other settings.
    """
    from torch._dynamo import convert_frame

    known = {code for seen in _code_sets(convert_frame) for code in seen}
    try:
        yield
    finally:
        for reference in {code for seen in _code_sets(convert_frame) for code in seen} - known:
            code = reference()
            if code is not None:
                torch._dynamo.reset_code(code)


def _code_sets(convert_frame: Any) -> list[list[Any]]:
    """Weak references to the code that Dynamo has seen and made, in lists of its own."""
    sets = [getattr(convert_frame, name, None) for name in ("input_codes", "output_codes")]
    return [list(getattr(codes, "seen", ())) for codes in sets]


def _begin(look_through: bool) -> None:
    """Nested and concurrent calls share the lesson of the first."""
    with _lock:
        _lesson.depth += 1
        if _lesson.depth > 1:
            return
        try:
            from torch._dynamo.variables.functions import SkipFunctionVariable
            from torch._dynamo.variables.tensor import TensorVariable

            for name in ("method_tolist", "method_item"):
                _replace(TensorVariable, name, reading_known_numbers(getattr(TensorVariable, name)))
            if look_through:
                method = SkipFunctionVariable.call_function
                _replace(SkipFunctionVariable, "call_function", looking_through(method, _lesson.looked_through))
        except (ImportError, AttributeError, KeyError) as error:
            log.debug("this version of Dynamo is left as it is: %s", error)


def _end() -> None:
    with _lock:
        _lesson.depth -= 1
        while _lesson.depth == 0 and _lesson.undo:
            _lesson.undo.pop()()


def _replace(owner: Any, name: str, value: Any) -> None:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    _lesson.undo.append(lambda: setattr(owner, name, before))
