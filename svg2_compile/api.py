"""The verbs of the library: enable, disable, reset, report. (explain is in explanation.py.)"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from svg2_compile.backend import Svg2Backend
from svg2_compile.hosts.diffusers import expected_layers, repeated_blocks, transformers_of
from svg2_compile.hosts.in_place import Enabled, compile_in_place, compile_parts, enabled_of, register
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.session import Session, report_of, sessions
from svg2_compile.settings.config import Svg2Config

if TYPE_CHECKING:
    from svg2_compile.export.transformed import TransformedProgram

__all__ = ["Enabled", "disable", "enable", "report", "reset"]


def enable(
    pipe_or_module: Any,
    regional: bool = False,
    *,
    scheduler: Any = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    program: TransformedProgram | Mapping[str, TransformedProgram] | None = None,
    **options: Any,
) -> Enabled:
    """Compile the transformer(s) of a pipeline, or one module, in place with backend "svg2".

    With ``program``, calls run a transformed program instead, with the weights that it brings.

    Args:
        pipe_or_module: a diffusers pipeline (its transformers are compiled and its scheduler is followed), or a module.
        regional: compile one graph for every kind of repeated block instead of one for the whole model: a shorter
            first step.
        scheduler: for a module, the scheduler that drives it; None watches the timestep input instead.
        fullgraph, dynamic: as of torch.compile.
        program: of ``svg2_compile.transform`` or ``load``, to run in the place of the transformer; for a pipeline with
            several transformers a mapping by name. Nothing is compiled with Dynamo then.
        **options: the fields of Svg2Config; with ``program``, those that ``svg2_compile.load`` takes.

    Returns:
        A handle with ``report()``, ``reset()`` and ``disable()``; as a context manager it disables at its end.

    Raises:
        TypeError: nothing in ``pipe_or_module`` can be compiled.
        ValueError: an option is unknown or out of range, ``regional`` finds no repeated blocks, or ``program`` does not
            fit.
    """
    modules = transformers_of(pipe_or_module)
    programs = _programs(program, modules, options, regional)
    config = next(iter(programs.values())).config if programs else Svg2Config.from_options(options)
    disable(pipe_or_module)
    session = Session(config, _scheduler_of(pipe_or_module, scheduler), expected_layers)
    enabled = Enabled(pipe_or_module, session)
    enabled._undo.append(session.step_count.stop)
    session.follow_scheduler()
    backend = Svg2Backend(config, session, regional=True if regional else None)
    try:
        for name, module in modules.items():
            if name in programs:
                from svg2_compile.export.in_pipeline import run_in_place

                run_in_place(module, name, programs[name], enabled)
            elif programs:
                continue
            elif regional:
                parts = repeated_blocks(module)
                compile_parts(module, name, parts, backend, enabled, fullgraph=fullgraph, dynamic=dynamic)
            else:
                compile_in_place(module, name, backend, enabled, fullgraph=fullgraph, dynamic=dynamic)
    except BaseException:
        enabled.disable()
        raise
    register(pipe_or_module, enabled)
    return enabled


def _scheduler_of(target: Any, scheduler: Any) -> Callable[[], Any] | None:
    """Yields the scheduler of ``target`` as it is whenever it is asked for; None where there never is one."""
    if scheduler is not None:
        return lambda: scheduler
    if isinstance(target, nn.Module):
        return None
    reference = weakref.ref(target)
    return lambda: getattr(reference(), "scheduler", None)


def _programs(
    program: TransformedProgram | Mapping[str, TransformedProgram] | None,
    modules: Mapping[str, nn.Module],
    options: Mapping[str, Any],
    regional: bool,
) -> dict[str, TransformedProgram]:
    if program is None:
        return {}
    from svg2_compile.export.in_pipeline import programs_of

    if regional:
        raise ValueError("regional=True: a program has graphs of its own. Valid with program: regional=False.")
    return programs_of(program, modules, options)


def disable(pipe_or_module: Any) -> None:
    """Undo ``enable``: put back exactly what was there. Does nothing where nothing was enabled."""
    enabled = enabled_of(pipe_or_module)
    if enabled is not None:
        enabled.disable()


def reset(target: Any = None) -> None:
    """Drop all centroids and begin a new video: of an enabled pipeline, a compiled module, or (None) everywhere."""
    for session in _sessions_of(target):
        session.reset()


def report(target: Any = None) -> Report:
    """What was decided and what ran: of an enabled pipeline, a compiled module, or (None) everything alive."""
    return report_of(_sessions_of(target))


def _sessions_of(target: Any) -> list[Session]:
    if target is None:
        return sessions()
    enabled = enabled_of(target)
    if enabled is not None:
        return [enabled.session]
    if isinstance(getattr(target, "session", None), Session):
        return [target.session]  # a transformed program
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"target: expected an enabled pipeline, a module, a transformed program, or None; got "
            f"{type(target).__name__}, not enabled"
        )
    return [session for session in sessions() if _serves(session, target)]


def _serves(session: Session, module: nn.Module) -> bool:
    parameters = {id(parameter) for parameter in module.parameters()}
    return not parameters.isdisjoint(session.layers.parameter_ids())
