"""Graph breaks: where Dynamo left the model's code, in which line, and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["noting_breaks"]

_KNOWN = "numbers that were made of Python numbers in the same call are known to svg2_compile.enable()"
_WAYS_OUT: Mapping[str, str] = {
    "Data dependent operator": f"keep sizes as Python ints beside the tensor; {_KNOWN}",
    "Unsupported Tensor.item()": f"keep the number as a Python int beside the tensor; {_KNOWN}",
    "Data-dependent branching": f"branch on a Python number in its place; {_KNOWN}",
    "Dynamic shape operator": "svg2_compile.enable() traces it, as does "
    "torch._dynamo.config.capture_dynamic_output_shape_ops = True",
    "Skip calling `torch.compiler.disable()`d": "svg2_compile.enable() looks through the decorator, or remove it",
    "Missing bytecode handler": "write the statement in another way (a `del` of a variable that an inner function or a "
    "comprehension uses is not traced before Python 3.12: leave it out)",
    "Attempted to call function marked as skipped": "call it outside of the model; svg2_compile.enable() makes "
    "warnings and prints after the graph",
    "Call to `torch._dynamo.graph_break()`": "remove the call",
}
_DEFAULT = "TORCH_LOGS=graph_breaks tells more"


def noting_breaks(method: Callable[..., Any], found: dict[str, str]) -> Callable[..., Any]:
    """Dynamo's ``log_graph_break``; ``found`` learns every place, with the reason and the way out."""

    @functools.wraps(method)
    def log_graph_break(self: Any, *args: Any, **kwargs: Any) -> Any:
        text = str(kwargs.get("exc") or kwargs.get("reason") or "graph break")
        found.setdefault(_place(self, kwargs.get("exc")), _in_words(text))
        return method(self, *args, **kwargs)

    return log_graph_break


def _place(translator: Any, error: Any) -> str:
    stack = list(getattr(error, "real_stack", None) or ())
    frame = stack[-1] if stack else translator.frame_summary()
    return f"{frame.filename}:{frame.lineno}"


def _in_words(text: str) -> str:
    """The kind of break, its first sentence of explanation, and the way out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    title = next((line for line in lines if not line.startswith("Failed to handle")), "graph break")
    explanation = next((line for line in lines if line.startswith("Explanation: ")), "").removeprefix("Explanation: ")
    way_out = next((way for kind, way in _WAYS_OUT.items() if title.startswith(kind)), _DEFAULT)
    return f"{title.rstrip('.')}. {explanation} Way out: {way_out}."
