"""``svg2 inspect my_model.py:build --call my_model.py:inputs``: a model of one's own, before anything is changed in it.

def build(): return MyTransformer(layers=2)                    # small, with random weights
def inputs(): return (torch.randn(1, 16, 5, 32, 48), torch.tensor([900.0])), {"text": torch.randn(1, 64, 512)}
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svg2_compile.explanation import explain
from svg2_compile.passes.device_profile import profile_named
from svg2_compile.reporting.report import Report
from svg2_compile.settings.config import Svg2Config
from svg2_compile.tools.inspect import InspectError, shape_in_words

__all__ = ["inspect_own_model"]


def inspect_own_model(
    model: str, call: str, options: Mapping[str, Any] | None = None, device: str | None = None
) -> Report:
    """Report on a model of one's own, built and called by functions in Python files. The files are run.

    Args:
        model: "FILE.py:FUNCTION"; the function builds the module.
        call: "FILE.py:FUNCTION"; the function returns the arguments of one call: a tuple, a dict, or both as a pair.
        options: the fields of Svg2Config.
        device: as of :func:`inspect_class`.

    Raises:
        InspectError: a file or a function is missing, fails, or returns something else.
        ConfigError: an option is not valid.
    """
    chosen = Svg2Config.from_options(options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile_named(device)
    module = _result_of("MODEL", model)
    if not isinstance(module, nn.Module):
        raise InspectError(f"MODEL={model!r}: expected a torch.nn.Module, got {type(module).__name__}.")
    args, kwargs = _as_call(call, _result_of("--call", call))
    report = explain(module.eval(), *args, options=chosen.to_dict(), estimate_for=device, **kwargs)
    named = [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]
    report.notes.insert(0, "inputs: " + ", ".join(f"{name} {shape_in_words(value)}" for name, value in named))
    return report


def _result_of(where: str, text: str) -> Any:
    """What the function of "FILE.py:FUNCTION" returns."""
    path_text, colon, name = text.rpartition(":")
    path = Path(path_text)
    if not colon or path.suffix != ".py":
        raise InspectError(f"{where}={text!r}: valid is FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InspectError(f"{where}={text!r}: there is no file {path}.")
    known = sys.modules.get(path.stem)
    module = known if known is not None and getattr(known, "__file__", None) == str(path) else None
    try:
        if module is None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module  # dataclasses and pickles look their module up
            sys.path.insert(0, str(path.parent))
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(path.parent))
        function = getattr(module, name)
        return function()
    except Exception as error:
        raise InspectError(f"{where}={text!r} failed with {type(error).__name__}: {error}") from error


def _as_call(where: str, returned: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(returned, Mapping):
        return (), dict(returned)
    if isinstance(returned, (tuple, list)):
        if len(returned) == 2 and isinstance(returned[0], (tuple, list)) and isinstance(returned[1], Mapping):
            return tuple(returned[0]), dict(returned[1])
        return tuple(returned), {}
    raise InspectError(
        f"--call={where!r}: expected the arguments of a call (a tuple, a dict, or a pair of both), got "
        f"{type(returned).__name__}."
    )
