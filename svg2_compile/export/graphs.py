"""The graphs of an exported program in the form that the run time calls: flat tensors in, flat tensors out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.codegen.inner_backend import compile_inner
from svg2_compile.codegen.symbols import SymbolBinder
from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.passes.graph.values import fake_mode_of, input_values
from svg2_compile.settings.config import Svg2Config

__all__ = ["ExportedGraph", "flat_module", "new_guards"]

log = get_logger()


def flat_module(program: ExportedProgram) -> fx.GraphModule:
    """The graph with its weights inside (shared, not copied); constants are no inputs any more."""
    module = program.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt, torch.SymFloat)):
            graph.erase_node(node)
    return fx.GraphModule(module, graph)


@contextlib.contextmanager
def new_guards(gm: fx.GraphModule) -> Iterator[list[Any]]:
    """Collects what is assumed of the symbolic sizes of a graph while inside, as sympy expressions."""
    shape_env = fake_mode_of(gm).shape_env
    found: list[Any] = []
    known = len(shape_env.guards) if shape_env is not None else 0
    yield found
    if shape_env is not None:
        found += [guard.expr for guard in shape_env.guards[known:]]


class ExportedGraph(CompiledGraph):
    """A graph that runs compiled where the compiler's assumptions hold, and as it is elsewhere.

    With dynamic shapes a compiler may assume more of the sizes than the exported program does. Dynamo would compile
    again; here nobody listens, so that what was assumed is looked at in every call.
    """

    def __init__(self, gm: fx.GraphModule, config: Svg2Config) -> None:
        self._config = config
        self._binder = SymbolBinder(gm)
        self._assumed: list[Any] = []
        self._verdicts: dict[tuple[int, ...], bool] = {}
        self._once = Once(log)
        super().__init__(gm, input_values(gm), self._compile)

    @classmethod
    def of(cls, which: str, program: ExportedProgram, config: Svg2Config) -> ExportedGraph:
        """The graph of a program, to be compiled by the inner backend."""
        return cls(flat_module(program), config)

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        config = self._config
        with new_guards(gm) as self._assumed:
            return compile_inner(gm, examples, config.inner_backend, config.inductor_mode, strict=config.strict)

    def __call__(self, *args: Any) -> Any:
        run = self.compile()
        if self._assumed and not self._holds(args):
            return self.gm.forward(*args)
        return run(*args)

    def _holds(self, args: Sequence[Any]) -> bool:
        values = self._binder.values(args)
        sizes = tuple(int(value) for value in values.values())
        if sizes not in self._verdicts:
            failed = [expr for expr in self._assumed if expr.xreplace(values) == False]  # noqa: E712 (sympy)
            self._verdicts[sizes] = not failed
            if failed:
                message = f"inputs of sizes {sizes} run through the uncompiled graph: the compiler assumed {failed[0]}"
                if self._config.strict:
                    raise RuntimeError(f"strict=True: {message}. Export with static sizes, or inner_backend='eager'.")
                self._once.warning("assumed", "%s", message)
        return self._verdicts[sizes]
