"""Dynamo while an enabled model runs: its settings, and what it is taught for as long as a call lasts.

Taught are host reads of known numbers and branches on them (host_reads.py, branches.py), imports that fail
(missing_imports.py), looking through torch.compiler.disable (disabled.py), and seeing attention inside of what it gave
up on (visible_attention.py). All of them replace functions and put them back; where a version of Dynamo has no such
function, it is not taught.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from svg2_compile.hosts.branches import jumps
from svg2_compile.hosts.breaks import noting_breaks
from svg2_compile.hosts.context_parallel import untraced_messages
from svg2_compile.hosts.disabled import looking_through
from svg2_compile.hosts.host_reads import reading_known_numbers
from svg2_compile.hosts.missing_imports import imports
from svg2_compile.hosts.shared_context import dynamo_context
from svg2_compile.hosts.visible_attention import as_python_function
from svg2_compile.logs.logger import get_logger

__all__ = ["Lesson", "enabled_dynamo_settings", "forgotten_frames", "noted_breaks"]

log = get_logger()
_lock = threading.RLock()


@dataclass
class Lesson:
    """What Dynamo met while it was taught. looked_through: names of disabled functions that were traced. breaks: places
    at which it broke a graph, with the reason and the way out in words."""

    looked_through: dict[str, None] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    depth: int = 0


_lesson = Lesson()


def _patched_config() -> Any:
    config = torch._dynamo.config
    patches: dict[str, Any] = {
        "capture_dynamic_output_shape_ops": True,
        "recompile_limit": max(64, config.recompile_limit),
        "reorderable_logging_functions": config.reorderable_logging_functions | {warnings.warn, print},
    }
    # Its name before it took functions as well.
    ignored = next(
        (name for name in ("ignore_logging_functions", "ignore_logger_methods") if hasattr(config, name)), None
    )
    if ignored is not None:
        patches[ignored] = getattr(config, ignored) | untraced_messages()
    return config.patch(patches)


_settings = dynamo_context(_patched_config)


@contextlib.contextmanager
def enabled_dynamo_settings(look_through: bool = True) -> Iterator[Lesson]:
    """Dynamo's settings while an enabled model runs, as a context manager.

    Some models pick the valid text tokens by a mask (nonzero); without the first setting they fall into eager pieces
    whose attention no compiler sees. Every call of enable or explain adds cache entries to what runs between graph
    breaks: with the default limit of 8 a long-lived process would silently fall back to eager.

    Warnings and prints are made after the graph that they stand in, rather than between two halves of it.

    look_through: trace functions under torch.compiler.disable as well.
    """
    with _settings():
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


@contextlib.contextmanager
def noted_breaks() -> Iterator[dict[str, str]]:
    """Collect the places at which Dynamo breaks graphs in here: "file:line" -> the reason and the way out."""
    found: dict[str, str] = {}
    undo: list[Callable[[], None]] = []
    try:
        _note_breaks(found, undo)
    except (ImportError, KeyError) as error:
        log.debug("this version of Dynamo does not say where it breaks: %s", error)
    try:
        yield found
    finally:
        _put_back(undo)


def _begin(look_through: bool) -> None:
    """Nested and concurrent calls share the lesson of the first."""
    with _lock:
        _lesson.depth += 1
        if _lesson.depth > 1:
            return
        _lesson.looked_through.clear()
        _lesson.breaks.clear()
        attention = torch.nn.functional.scaled_dot_product_attention
        _replace(torch.nn.functional, "scaled_dot_product_attention", as_python_function(attention), _lesson.undo)
        try:
            _teach(_lesson, look_through)
        except (ImportError, AttributeError, KeyError) as error:
            log.debug("this version of Dynamo is left as it is: %s", error)


def _note_breaks(found: dict[str, str], undo: list[Callable[[], None]]) -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    method = InstructionTranslatorBase.__dict__["log_graph_break"]
    _replace(InstructionTranslatorBase, "log_graph_break", noting_breaks(method, found), undo)


def _teach(lesson: Lesson, look_through: bool) -> None:
    from torch._dynamo.variables.functions import SkipFunctionVariable
    from torch._dynamo.variables.tensor import TensorVariable

    for name in ("method_tolist", "method_item"):
        _replace(TensorVariable, name, reading_known_numbers(getattr(TensorVariable, name)), lesson.undo)
    for taught in (*jumps(), *imports()):
        taught.table[taught.place] = taught.knowing
    lesson.undo.append(_forget_instructions)
    _note_breaks(lesson.breaks, lesson.undo)
    if look_through:
        call = looking_through(SkipFunctionVariable.call_function, lesson.looked_through)
        _replace(SkipFunctionVariable, "call_function", call, lesson.undo)


def _end() -> None:
    with _lock:
        _lesson.depth -= 1
        if _lesson.depth == 0:
            _put_back(_lesson.undo)


def _put_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _forget_instructions() -> None:
    for taught in (*jumps(), *imports()):
        taught.table[taught.place] = taught.before


def _replace(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, before))
