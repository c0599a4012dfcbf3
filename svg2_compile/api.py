"""The verbs of the library: enable, disable, reset, report. (explain is in explanation.py.)"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svg2_compile.backend import Svg2Backend
from svg2_compile.explanation import enabled_dynamo_settings
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.clock import SchedulerClock, TimestepClock
from svg2_compile.runtime.scheduler import SchedulerHook
from svg2_compile.runtime.session import Session, report_of, sessions
from svg2_compile.settings.config import Svg2Config

if TYPE_CHECKING:
    from svg2_compile.export.transformed import TransformedProgram

__all__ = ["Enabled", "disable", "enable", "report", "reset"]

_enabled: weakref.WeakKeyDictionary[Any, Enabled] = weakref.WeakKeyDictionary()


class Enabled:
    """A pipeline or module that runs sparse. Also a context manager that disables at its end.

    Attributes:
        session: clock, centroids, history and compiled programs.
        modules: the modules that were compiled.
    """

    def __init__(self, target: Any, session: Session) -> None:
        self.session = session
        # Weak, like all that is kept of the target here: the registry of enabled targets must not keep them alive.
        self._modules: list[weakref.ref[nn.Module]] = []
        self._undo: list[Callable[[], None]] = []
        self._target = weakref.ref(target)

    @property
    def modules(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]

    def report(self) -> Report:
        return report_of([self.session])

    def reset(self) -> None:
        self.session.reset()

    def disable(self) -> None:
        """Put back exactly what was there."""
        while self._undo:
            self._undo.pop()()
        target = self._target()
        if target is not None:
            _enabled.pop(target, None)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


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
    modules = _transformers(pipe_or_module)
    programs = _programs(program, modules, options, regional)
    config = next(iter(programs.values())).config if programs else Svg2Config.from_options(options)
    disable(pipe_or_module)
    if scheduler is None:
        scheduler = getattr(pipe_or_module, "scheduler", None)
    clock = SchedulerClock() if scheduler is not None else TimestepClock()
    session = Session(config, clock)
    enabled = Enabled(pipe_or_module, session)
    if isinstance(clock, SchedulerClock):
        enabled._undo.append(SchedulerHook(scheduler, clock).remove)
    backend = Svg2Backend(config, session, regional=regional)
    try:
        for name, module in modules.items():
            if programs:
                if name in programs:
                    _run_in_place(module, name, programs[name], enabled)
                continue
            parts = _repeated_blocks(module) if regional else {"": module}
            for path, part in parts.items():
                label = ".".join(filter(None, (name, path)))
                _compile_in_place(part, label, backend, enabled, fullgraph=fullgraph, dynamic=dynamic)
    except BaseException:
        enabled.disable()
        raise
    _enabled[pipe_or_module] = enabled
    return enabled


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
    enabled = _enabled_of(pipe_or_module)
    if enabled is not None:
        enabled.disable()


def reset(target: Any = None) -> None:
    """Drop all centroids and begin a new video: of an enabled pipeline, a compiled module, or (None) everywhere."""
    for session in _sessions_of(target):
        session.reset()


def report(target: Any = None) -> Report:
    """What was decided and what ran: of an enabled pipeline, a compiled module, or (None) everything alive."""
    return report_of(_sessions_of(target))


def _transformers(target: Any) -> dict[str, nn.Module]:
    """The modules to compile, by name: the transformers (or UNets) of a pipeline. A single one needs no name."""
    if isinstance(target, nn.Module):
        return {"": getattr(target, "_orig_mod", target)}
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(
            f"pipe_or_module: expected a torch.nn.Module or a diffusers pipeline (an object with components), "
            f"got {type(target).__name__}"
        )
    found = {
        name: getattr(component, "_orig_mod", component)
        for name, component in components.items()
        if isinstance(component, nn.Module) and ("transformer" in name or "unet" in name)
    }
    if not found:
        raise TypeError(
            f"pipe_or_module: {type(target).__name__} has no transformer among its components {sorted(components)}"
        )
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def _repeated_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks that repeat, by path: those that a diffusers class declares, else composite items of ModuleLists."""
    declared = getattr(module, "_repeated_blocks", None)
    if declared:
        blocks = {path: child for path, child in module.named_modules() if type(child).__name__ in declared}
    else:
        blocks = {
            f"{path}.{index}": block
            for path, child in module.named_modules()
            if isinstance(child, nn.ModuleList) and len({type(item) for item in child}) == 1
            for index, block in enumerate(child)
            if len(list(block.children())) > 1
        }
        inner = {id(part) for block in blocks.values() for part in block.modules() if part is not block}
        blocks = {path: block for path, block in blocks.items() if id(block) not in inner}
    if not blocks:
        raise ValueError(f"regional=True: {type(module).__name__} has no repeated blocks; use regional=False")
    return blocks


def _compile_in_place(
    module: nn.Module, label: str, backend: Svg2Backend, enabled: Enabled, *, fullgraph: bool, dynamic: bool | None
) -> None:
    """Let calls of ``module`` run compiled."""
    compiled = torch.compile(module._call_impl, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    session = enabled.session

    def call(*args: Any, **kwargs: Any) -> Any:
        with session.scope.running(module, label), enabled_dynamo_settings():
            result = compiled(*args, **kwargs)
        if not backend.graphs:
            session.once.warning(
                "no graph",
                "%s runs eagerly and dense: Dynamo handed over no graph of it (after too many recompilations it gives "
                "a function up for good; torch._dynamo.reset() starts over).",
                type(module).__name__,
            )
        return result

    _replace_call(module, call, enabled)


def _run_in_place(module: nn.Module, label: str, program: TransformedProgram, enabled: Enabled) -> None:
    """Let calls of ``module`` run a transformed program."""
    from svg2_compile.export.in_pipeline import call_through

    session = enabled.session
    run = call_through(module, program, session)
    # The module is held weakly: what it is called through must not keep it alive.
    reference = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        assert alive is not None  # it is being called
        with session.scope.running(alive, label):
            return run(*args, **kwargs)

    _replace_call(module, call, enabled)


def _replace_call(module: nn.Module, call: Callable[..., Any], enabled: Enabled) -> None:
    """Let calls of ``module`` go to ``call``; ``enabled`` learns how to undo it."""
    before = module._compiled_call_impl
    module._compiled_call_impl = call
    reference = weakref.ref(module)
    enabled._modules.append(reference)

    def undo() -> None:
        alive = reference()
        if alive is not None:
            alive._compiled_call_impl = before

    enabled._undo.append(undo)


def _enabled_of(target: Any) -> Enabled | None:
    try:
        return _enabled.get(target)
    except TypeError:  # nothing that can be weakly referenced or hashed was ever enabled
        return None


def _sessions_of(target: Any) -> list[Session]:
    if target is None:
        return sessions()
    enabled = _enabled_of(target)
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
    return any(not parameters.isdisjoint(program.layers.parameter_ids()) for program in session.programs)
