"""The inner backend: what compiles the graphs after the passes are done with them.

Inductor is the default. It needs a compiler of its own on every machine: C++ for CPU code, Triton (and a C compiler
for its launchers) for GPU code. Where these are missing the graphs run through "eager": it calls the very operators
that the model would have called, so dense steps stay bit-identical to the uncompiled model, and the sparse operators
are as fast as they are under any backend. "aot_eager" would trace the graph once more into ATen for no gain.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from svg2_compile.logs.logger import Once, get_logger

__all__ = ["CompiledGraph", "compile_inner", "default_inner_backend", "inductor_problem", "resolve_inner_backend"]

CompiledGraph = Callable[..., Any]

NEXT_BEST = "eager"

log = get_logger(__name__)
# What a machine lacks is a fact about the process, so saying it once is per process too.
_said_in_process = Once(log)


@functools.cache
def inductor_problem(device_type: str) -> str | None:
    """What keeps Inductor from generating code for a device on this machine.

    Args:
        device_type: as in ``torch.device.type``: "cpu", "cuda", "xpu" ... Any other type is taken to work.

    Returns:
        None if nothing does, otherwise one sentence that says what is missing and how to get it.
    """
    if device_type == "cpu":
        return _cpp_problem()
    if device_type in ("cuda", "xpu"):
        return _triton_problem(device_type)
    return None


def _cpp_problem() -> str | None:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except (RuntimeError, OSError, subprocess.SubprocessError):
        # Inductor's own words are an advice to read its configuration; which command was looked for helps more.
        return "no C++ compiler found (install g++ or clang, or set CXX to one)"
    # Inductor's generated module is a Python extension.
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"the header Python.h of Python {sysconfig.get_python_version()} is missing (install python3-dev)"
    return None


def _triton_problem(device_type: str) -> str | None:
    from torch.utils._triton import has_triton, has_triton_package

    if not has_triton_package():
        return "Triton is not installed (pip install triton)"
    if not has_triton():
        return f"Triton does not support this {device_type} device"
    if os.name == "posix" and not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        return "no C compiler found, which Triton needs for its launchers (install gcc or clang, or set CC)"
    return None


def default_inner_backend(device: torch.device | str, once: Once | None = None) -> str:
    """ "inductor" where it can work for ``device``, otherwise the next best, after saying once what is missing.

    Args:
        device: where the graph runs.
        once: what speaks; by default each sentence is said once in the process.
    """
    device_type = torch.device(device).type
    problem = inductor_problem(device_type)
    if problem is None:
        return "inductor"
    (once or _said_in_process).warning(
        ("inner_backend", device_type),
        "Inductor cannot compile for %s: %s. Using inner_backend=%r instead: results are the same, "
        "without Inductor's fusions.",
        *(device_type, problem, NEXT_BEST),
    )
    return NEXT_BEST


def resolve_inner_backend(
    name: str, device: torch.device | str, *, strict: bool = False, once: Once | None = None
) -> str:
    """The backend to use when ``name`` was asked for on ``device``.

    Only "inductor" is ever replaced, as :func:`default_inner_backend` tells.

    Raises:
        RuntimeError: with ``strict``, if Inductor cannot work on this machine.
    """
    if name != "inductor":
        return name
    problem = inductor_problem(torch.device(device).type)
    if strict and problem is not None:
        raise RuntimeError(f"inner_backend='inductor' with strict=True: {problem}. Valid here: {NEXT_BEST!r}.")
    return default_inner_backend(device, once)


def compile_inner(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    backend_name: str,
    mode: str | None = None,
    *,
    strict: bool = False,
) -> CompiledGraph:
    """Compile one graph.

    Args:
        gm: a Dynamo graph.
        example_inputs: as Dynamo handed them to the outer backend (real or fake tensors, and symbolic ints).
        backend_name: any backend that torch.compile knows by name, except "svg2" itself; "inductor" as
            :func:`resolve_inner_backend` takes it on the device of the inputs.
        mode: a mode of torch.compile ("max-autotune" ...); for Inductor only, other backends run without it.

    Raises:
        ValueError: if ``backend_name`` is not registered, or is "svg2".
        RuntimeError: with ``strict``, if Inductor is asked for and cannot work on this machine.
    """
    backend_name = resolve_inner_backend(backend_name, _device_of(example_inputs), strict=strict)
    if backend_name == "svg2":
        raise ValueError("inner_backend='svg2' names this compiler itself. Valid: 'inductor', 'eager' ...")
    if backend_name == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else None
        with _numbers_read():
            return cast(CompiledGraph, compile_fx(gm, list(example_inputs), config_patches=patches))
    return cast(CompiledGraph, _lookup(backend_name)(gm, list(example_inputs)))


@contextlib.contextmanager
def _numbers_read() -> Iterator[None]:
    """While inside, a graph may read a number from a tensor, as Dynamo let it (hosts/host_reads.py).

    Backends are handed a fake mode of their own, which does not know that.
    """
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    if mode is None:
        yield
        return
    before, mode.allow_scalar_outputs = mode.allow_scalar_outputs, True
    try:
        yield
    finally:
        mode.allow_scalar_outputs = before


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    """The device that code will be generated for: an accelerator if any input is on one, else the CPU."""
    devices = [value.device for value in example_inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _lookup(name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return cast(Callable[..., Any], lookup_backend(name))
    except InvalidBackend:
        # PyTorch leaves the two eager ones out of its list, as aids for debugging.
        known = ", ".join(sorted({*list_backends(), "eager", "aot_eager"} - {"svg2"}))
        raise ValueError(f"inner_backend={name!r} is not a backend of torch.compile. Valid: {known}.") from None
