"""Who answers the calls of a module: several may want to, and may stop wanting to in any order."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from svg2_compile.logs.logger import get_logger

__all__ = ["replace_call"]

log = get_logger()

# Kept on the module itself: what answers its calls refers to it, and both are to be freed together.
_ATTRIBUTE = "_svg2_answers"


class _Answers:
    """Those who want to answer the calls of one module, the latest last, and what was there before the first.

    Copies and pickles of the module take none of them along.
    """

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before
        self.calls: dict[object, Callable[..., Any]] = {}

    @property
    def now(self) -> Callable[..., Any] | None:
        return next(reversed(self.calls.values())) if self.calls else self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Answers:
        return _Answers(None)

    def __reduce__(self) -> Any:
        return _Answers, (None,)


def replace_call(module: nn.Module, call: Callable[..., Any]) -> Callable[[], None]:
    """Let calls of ``module`` go to ``call``, for as long as nobody else wants them later. Returns how to undo it.

    When it is undone, calls go to whoever wanted them before and still does, or where they went at first.
    """
    answers = vars(module).get(_ATTRIBUTE)
    if answers is None or not answers.calls:
        answers = _Answers(vars(module).get("_compiled_call_impl"))
        vars(module)[_ATTRIBUTE] = answers
    token = object()
    answers.calls[token] = call
    module._compiled_call_impl = call
    # Whoever may undo it does not keep the module alive.
    reference = weakref.ref(module)

    def undo() -> None:
        alive = reference()
        if alive is not None:
            _take_back(alive, token)

    return undo


def _take_back(module: nn.Module, token: object) -> None:
    answers = vars(module).get(_ATTRIBUTE)
    if answers is None or token not in answers.calls:
        return
    foreign = module._compiled_call_impl is not answers.now
    del answers.calls[token]
    if foreign:
        log.warning(
            "%s was compiled in place by somebody else while it was enabled: that is left as it is.",
            type(module).__name__,
        )
    elif answers.now is not None:
        module._compiled_call_impl = answers.now
    else:
        vars(module).pop("_compiled_call_impl", None)
    if not answers.calls:
        del vars(module)[_ATTRIBUTE]
