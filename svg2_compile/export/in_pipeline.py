"""A transformed program in the place of a pipeline's transformer: the module stays, its calls go to the program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from svg2_compile.export.errors import ExportError
from svg2_compile.export.transformed import TransformedProgram, check_transformed
from svg2_compile.hosts.in_place import Enabled, run_as_model
from svg2_compile.runtime.session import Session

__all__ = ["call_through", "programs_of", "run_in_place"]


def programs_of(
    program: TransformedProgram | Mapping[str, TransformedProgram],
    modules: Mapping[str, nn.Module],
    options: Mapping[str, Any],
) -> dict[str, TransformedProgram]:
    """The program of every module that has one, with run-time options replaced.

    Args:
        program: one for the only module, or by name for several ("transformer", "transformer_2").
        modules: the transformers of a pipeline by name; a single one may have the name "".
        options: run-time options.

    Raises:
        TypeError: something is no transformed program.
        ExportError: a name is missing or unknown, or the programs run with different options.
    """
    named = dict(program) if isinstance(program, Mapping) else {next(iter(modules)): program}
    if not isinstance(program, Mapping) and len(modules) > 1:
        raise ExportError(f"program: one given for {len(modules)} modules. Valid: a mapping with {sorted(modules)}.")
    if unknown := sorted(set(named) - set(modules)) or (not named and ["nothing"]):
        raise ExportError(f"program: given for {unknown}. Valid: {sorted(modules)}.")
    chosen = {}
    for name, given in named.items():
        checked = check_transformed(given, f"program[{name!r}]" if name else "program")
        chosen[name] = checked.with_options(options) if options else checked
    if len({item.config for item in chosen.values()}) > 1:
        raise ExportError("program: the programs have different options. Valid: one set of options for a pipeline.")
    return chosen


def run_in_place(module: nn.Module, label: str, program: TransformedProgram, enabled: Enabled) -> None:
    """Let calls of ``module`` run a transformed program."""
    run_as_model(module, label, enabled, call_through(module, program, enabled.session))


def call_through(module: nn.Module, program: TransformedProgram, session: Session) -> Callable[..., Any]:
    """A function that is called like ``module`` and runs ``program`` in ``session``."""
    signature = inspect.signature(module.forward)
    denoiser = program.denoiser(session)
    exported = set(program.signature.argument_names)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {**bound.arguments}
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        as_tuple = given.get("return_dict") is False and "return_dict" not in exported
        kept = {name: value for name, value in given.items() if name in exported}
        for name in given.keys() - kept.keys() - {"return_dict"}:
            _check_default(name, given[name], signature)
        result = program.run(denoiser, (), kept)
        return result.to_tuple() if as_tuple and hasattr(result, "to_tuple") else result

    return call


def _check_default(name: str, value: Any, signature: inspect.Signature) -> None:
    """An argument that the program was exported without can only be what it was then: the default."""
    parameter = signature.parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    if value is not default and not (isinstance(value, (bool, int, float, str)) and value == default):
        raise ExportError(
            f"{name}: the program was exported without this argument, so it cannot change. Valid: {default!r}; or "
            "export the model with it."
        )
