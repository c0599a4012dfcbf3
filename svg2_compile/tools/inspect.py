"""``svg2 inspect``: which attentions of a model would become sparse, without its weights and without running it.

A class is built and traced under FakeTensorMode: tensors have shapes and no memory, so that a 14B model is inspected on
a laptop in under a minute.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from svg2_compile.explanation import explain
from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.device_profile import profile_named
from svg2_compile.reporting.report import Report
from svg2_compile.settings.config import Svg2Config
from svg2_compile.tools.example_inputs import InputsNotFound, VideoShape, find_inputs
from svg2_compile.tools.shorten import KEPT, leave_first_layers_dense, shortened, with_all_blocks

__all__ = [
    "InspectError",
    "inspect_class",
    "inspect_exported",
    "parse_dtype",
    "parse_input",
    "read_config",
]


log = get_logger()


class InspectError(ValueError):
    """The model could not be loaded, built or traced; says what to give instead."""


def inspect_class(
    path: str,
    config: Mapping[str, Any] | None = None,
    video: VideoShape | None = None,
    inputs: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
) -> Report:
    """Report on a model class.

    Args:
        path: import path, such as "diffusers.WanTransformer3DModel".
        config: arguments of the class, such as the content of a diffusers ``config.json``; the rest is defaults.
        video: size of the video in latents.
        inputs: input name -> "SHAPE:DTYPE" or a number, for what cannot be derived (see :func:`parse_input`).
        options: the fields of Svg2Config.
        dtype: of weights and inputs.
        device: to decide and to predict speed for, "cpu", "cuda", "cuda:sm_90" ...; None is a CUDA device if there is
            one here, else the CPU.

    Raises:
        InspectError: the class cannot be imported or built, or no inputs were found for it.
        ConfigError: an option is not valid.
    """
    chosen = Svg2Config.from_options(options)  # before the work
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile_named(device)
    cls = _load_class(path)
    arguments = {key: value for key, value in (config or {}).items() if not key.startswith("_")}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with _default_dtype(dtype):
            module = _build(cls, arguments).eval()
        given = {name: parse_input(name, text) for name, text in (inputs or {}).items()}
        try:
            found = find_inputs(module, _full_config(module, cls, arguments), video or VideoShape(), given, dtype)
        except InputsNotFound as error:
            raise InspectError(str(error)) from error
        report = _explain_shortened(module, found, chosen, device)
    report.notes.insert(0, "inputs: " + ", ".join(f"{name} {shape_in_words(value)}" for name, value in found.items()))
    return report


def _explain_shortened(module: nn.Module, inputs: Mapping[str, Any], config: Svg2Config, device: str) -> Report:
    """explain, with a few of every run of equal blocks traced."""
    with shortened(module) as cut:
        if cut:
            try:
                # Which layers stay dense depends on how many there are.
                report = _explain(module, inputs, {**config.to_dict(), "dense_layers": 0}, device)
            except Exception as error:
                log.debug("shortened model failed", exc_info=error)
            else:
                report.sites = leave_first_layers_dense(with_all_blocks(report.sites, cut), config.dense_layers)
                lists = ", ".join(f"{count} x {path}" for path, count in cut.items())
                report.notes.append(f"of {lists}, all equal, the first {KEPT} were traced")
                return report
    return _explain(module, inputs, config.to_dict(), device)


def _explain(module: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any], device: str) -> Report:
    try:
        return explain(module, options=options, estimate_for=device, **inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InspectError(
            f"{type(module).__name__} decides by the values of its inputs how it goes on ({error}), and an inspection "
            "has no values. Use svg2_compile.explain(module, ...) with a small configuration and real inputs."
        ) from error


def inspect_exported(path: Path, options: Mapping[str, Any] | None = None, device: str | None = None) -> Report:
    """Report on an exported program (``torch.export.save``); ``device`` as of :func:`inspect_class`, None is its own.

    Raises:
        InspectError: the file is missing or is no exported program.
        ConfigError: an option is not valid.
    """
    from svg2_compile.export.commands import read_exported
    from svg2_compile.export.errors import ExportError
    from svg2_compile.export.transform import run_on_program
    from svg2_compile.pipeline import ANALYSES
    from svg2_compile.reporting.describe import describe

    config = Svg2Config.from_options(options)
    target = None if device is None else profile_named(device)
    try:
        program = read_exported(path)
    except ExportError as error:
        raise InspectError(str(error)) from error
    c = run_on_program(program, config, ANALYSES, target)
    return Report(sites=describe(c.decisions, config=config, device=c.device), graphs=[c.graph_report(path.name)])


def parse_input(name: str, text: str) -> Any:
    """Read the value of one ``--input``.

    Args:
        name: of the input, for errors.
        text: "1x16x21x90x160:bfloat16" for a tensor of zeros, ":float32" for a scalar tensor, or a plain number or
            true/false.

    Raises:
        InspectError: the text is neither.
    """
    shape_text, colon, dtype_text = text.partition(":")
    if not colon:
        try:
            value = json.loads(text.lower())
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, (int, float)):
            raise InspectError(f"--input {name}={text}: valid are SHAPE:DTYPE (1x512x4096:bfloat16) and plain numbers.")
        return value
    dtype = parse_dtype(dtype_text, f"--input {name}={text}")
    try:
        shape = [int(extent) for extent in shape_text.replace(",", "x").split("x") if extent]
    except ValueError:
        raise InspectError(f"--input {name}={text}: {shape_text!r} is not a shape. Valid: 1x512x4096.") from None
    return torch.zeros(shape, dtype=dtype)


def parse_dtype(text: str, where: str) -> torch.dtype:
    """A dtype by its PyTorch name."""
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise InspectError(f"{where}: {text!r} is not a dtype. Valid: float32, bfloat16, float16, int64, bool ...")
    return dtype


def read_config(path: Path | None) -> dict[str, Any]:
    """The content of a JSON file with an object.

    Raises:
        InspectError: the file is missing or holds something else.
    """
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InspectError(f"--config {path}: {error}") from error
    if not isinstance(config, dict):
        raise InspectError(f"--config {path}: expected a JSON object, got {type(config).__name__}.")
    return config


def _load_class(path: str) -> type[nn.Module]:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InspectError(
            f"MODEL={path!r} is neither a .pt2 file nor an import path such as diffusers.WanTransformer3DModel."
        )
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise InspectError(f"MODEL={path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InspectError(f"MODEL={path!r} is no torch.nn.Module class.")
    return cls


def _build(cls: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return cls(**arguments)
    except Exception as error:
        raise InspectError(
            f"{cls.__name__} cannot be built from {'the configuration' if arguments else 'its defaults'}: "
            f"{type(error).__name__}: {error}. Give its arguments with --config FILE.json."
        ) from error


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build weights in ``dtype``. Casting them later would swap tensors, which fake ones do not allow."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _full_config(module: nn.Module, cls: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the module was built with, defaults included."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    registered = getattr(module, "config", {})
    return {**defaults, **(dict(registered) if isinstance(registered, Mapping) else {}), **arguments}


def shape_in_words(value: Any) -> str:
    return "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else str(value)
