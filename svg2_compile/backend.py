"""The Dynamo door: ``torch.compile(model, backend="svg2")``. Registered as an entry point of torch_dynamo_backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.codegen.inner_backend import compile_inner
from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.graph.collectives import rank_groups
from svg2_compile.passes.graph.values import graph_device, input_values, metadata_key
from svg2_compile.pipeline import PIPELINE, SAID, Compilation, run_passes
from svg2_compile.reporting.describe import describe
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.runtime.program import DenoisingProgram
from svg2_compile.runtime.session import Session, sessions
from svg2_compile.runtime.time_reader import TimeReader
from svg2_compile.settings.config import Svg2Config

__all__ = ["Svg2Backend", "svg2"]

log = get_logger()

_graph_numbers = itertools.count()
_SAID = frozenset(
    {
        "cost",
        "short_sequence",
        "unknown_layout",
        "layout_mismatch",
        "foreign_backend",
        "unreadable",
        "several_sequences",
        "picked_tokens",
        "nested_tensor",
    }
)
"""Reasons for which an attention over a video may stay dense though it need not: they are said once."""


def svg2(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's: video self-attention becomes SVG2 sparse attention.

    Args:
        gm: Dynamo's torch-level graph.
        example_inputs: its inputs.
        mode: as of torch.compile, handed to Inductor.
        options: the fields of Svg2Config.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    config = Svg2Config.from_options(options)
    if mode is not None:
        config = config.replace(inductor_mode=mode)
    return Svg2Backend(config, _session_of(config, example_inputs))(gm, example_inputs)


def _session_of(config: Svg2Config, example_inputs: Sequence[Any]) -> Session:
    """The session of the model whose weights are among the inputs, with its graphs of other sizes; or a new one."""
    weights = {id(value) for value in example_inputs if isinstance(value, torch.nn.Parameter)}
    for session in sessions():
        if session.of_backend and session.config == config and not weights.isdisjoint(session.layers.parameter_ids()):
            return session
    session = Session(config)
    session.of_backend = True
    return session


class Svg2Backend:
    """A backend that compiles every graph for one session.

    Args:
        config: the options.
        session: shared by all graphs compiled with this backend.
        regional: whether the graphs are known to be single layers (True), or to be told apart (None): also what is
            enabled as a whole may fall into pieces, by graph breaks or the hooks of others.
        video_parts: where the video is, or why nobody can tell, for graphs of one attention whose caller says it; None
            finds it.
    """

    def __init__(
        self,
        config: Svg2Config,
        session: Session,
        regional: bool | None = None,
        video_parts: Any = None,
    ) -> None:
        self.config = config
        self.video_parts = video_parts
        self.session = session
        self.regional = regional
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        name = f"{'graph' if self.video_parts is None else 'attention'}_{next(_graph_numbers)}"
        dense = CompiledGraph(gm, input_values(gm), self._compile_inner)
        if _is_training(example_inputs):
            self.session.once.warning(
                "training",
                "gradients are wanted: the graph stays dense. SVG2 is for inference; call the model under "
                "torch.no_grad() or torch.inference_mode().",
            )
            return dense.compile(example_inputs)
        compilation = self._analyse_and_rewrite(gm, name)
        if compilation is None:
            return self._without_sparse(name, dense, example_inputs)
        sparse = None
        if compilation.spec is not None:
            sparse = CompiledGraph(compilation.gm, input_values(compilation.gm), self._compile_inner)
        try:
            program = self._program(name, compilation, dense, sparse)
            self._compile_first(program, example_inputs)
        except torch._dynamo.exc.TorchDynamoException:
            raise  # Dynamo asks for a new start, or says that the graph itself cannot be compiled
        except Exception as error:
            if self.config.strict or sparse is None:
                raise
            self._say_what_failed(name, "compiling the sparse graph", error)
            return self._without_sparse(name, dense, example_inputs)
        return program

    def _without_sparse(self, name: str, dense: CompiledGraph, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The dense graph. Where other ranks run it as well, they are told that it has no sparse form here."""
        run = dense.compile(example_inputs)
        if not any(group.size > 1 for group in rank_groups(dense.gm)):
            return run
        return DenoisingProgram(
            name=name,
            session=self.session,
            dense=dense,
            sparse=None,
            spec=None,
            time_reader=TimeReader("none", ()),
            sites=(),
            graph_report=GraphReport(name, bool(self.regional), "none", {}),
        )

    def _analyse_and_rewrite(self, gm: fx.GraphModule, name: str) -> Compilation | None:
        """Run the pipeline on a copy. None, and a warning, if a pass fails: then the graph stays dense."""
        copied = copy_graph_module(gm)
        compilation = Compilation(
            *(copied, self.config, graph_device(gm), self.regional),
            name=name,
            first_dense=self.session.dense_layers().of_graph,
            video_parts=() if self.video_parts is None else self.video_parts,
        )
        try:
            return run_passes(compilation, PIPELINE if self.video_parts is None else SAID)
        except Exception as error:
            if self.config.strict:
                raise
            self._say_what_failed(name, "a compiler pass", error)
            return None

    def _say_what_failed(self, name: str, what: str, error: Exception) -> None:
        self.session.once.warning(
            f"failed {name}",
            "%s stays dense: %s failed with %s: %s. strict=True raises it.",
            *(name, what, type(error).__name__, error),
        )
        log.debug("failure of %s", what, exc_info=error)

    def _program(
        self, name: str, c: Compilation, dense: CompiledGraph, sparse: CompiledGraph | None
    ) -> DenoisingProgram:
        reports = describe(c.decisions, config=c.config, device=c.device)
        program = DenoisingProgram(
            name=name,
            session=self.session,
            dense=dense,
            sparse=sparse,
            spec=c.spec,
            time_reader=TimeReader(c.time_kind, c.time_positions),
            sites=reports,
            graph_report=c.graph_report(),
            worths=c.worths,
        )
        self._say_what_stays_dense(reports)
        return program

    def _say_what_stays_dense(self, reports: Sequence[SiteReport]) -> None:
        for report in reports:
            if report.reason in _SAID:
                self.session.once.warning(
                    report.reason, "%s stays dense (%s): %s", report.name, report.reason, report.detail
                )

    def _compile_first(self, program: DenoisingProgram, example_inputs: Sequence[Any]) -> None:
        """Compile while Dynamo still listens to guards and restarts; leave the rest until it is needed.

        The graph that the first call runs is compiled at once. With dynamic shapes both are: a guard that the sparse
        graph adds after Dynamo has finished would be checked by nobody.
        """
        dynamic = _is_dynamic(program.dense.gm)
        config = self.config
        dense_first = config.dense_steps != 0 or config.dense_layers != 0 or config.dense_timesteps is not None
        if dense_first or program.sparse is None:
            program.dense.compile(example_inputs)
        if program.sparse is not None and (dynamic or not dense_first):
            extra = input_values(program.sparse.gm)[len(example_inputs) :]
            program.sparse.compile([*example_inputs, *extra])

    def _compile_inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        config = self.config
        return compile_inner(gm, example_inputs, config.inner_backend, config.inductor_mode, strict=config.strict)


def _is_dynamic(gm: fx.GraphModule) -> bool:
    """Whether any value of the graph has a symbolic size (also one that depends on data)."""
    key = metadata_key(gm.graph)
    for node in gm.graph.nodes:
        value = node.meta.get(key)
        if isinstance(value, torch.SymInt):
            return True
        if isinstance(value, torch.Tensor) and any(isinstance(extent, torch.SymInt) for extent in value.shape):
            return True
    return False


def _is_training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
