"""TransformedProgram: what transform and load return, run like the exported model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.export.graphs import ExportedGraph
from svg2_compile.export.signature import CallSignature
from svg2_compile.passes.hoist_centroids import StateSpec
from svg2_compile.passes.worth import Worth
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.program import DenoisingProgram
from svg2_compile.runtime.session import Session, report_of
from svg2_compile.runtime.time_reader import TimeReader
from svg2_compile.settings.config import ConfigError, Svg2Config
from svg2_compile.settings.options import canonical_names

__all__ = ["TimeSource", "TransformedProgram"]

# What is decided at run time, and the density where it is an input of the graph. Everything else is part of the graphs.
RUN_TIME_OPTIONS = (
    *("init_iters", "step_iters", "dense_steps", "dense_last_steps", "dense_timesteps"),
    *("inner_backend", "inductor_mode", "strict", "store_limit_mb"),
)

# ("dense" or "sparse", its program, settings) -> the graph that the run time calls.
MakeGraph = Callable[[str, ExportedProgram, Svg2Config], CompiledGraph]


@dataclass(frozen=True)
class TimeSource:
    """Which inputs tell the denoising step, by name; kind as in TimeReading."""

    kind: str
    inputs: tuple[str, ...]


class TransformedProgram:
    """An exported program with sparse attention: a dense graph, a sparse graph, and the state carried between calls.

    Called like the exported model, in a denoising loop. The step is read from the timestep input; a timestep that
    goes back begins a new video, and so does :meth:`reset`. Calls compute no gradients.

    Attributes:
        dense: the exported program as it was given (regions of no_grad or autocast around attention are dissolved).
        sparse: the rewritten program: flat inputs, then centroids, ``seeded``, ``iters`` and, where heads share a
            budget, the density; flat outputs, then new centroids and densities. None if no attention became sparse.
        spec: how ``sparse`` is called, weights not counted; None with ``sparse``.
        config: the settings used.
        sites: every attention with its decision.
        worths: what is asked about the sizes of every call, where they are dynamic.
        signature: how the program is called.
        make_graph: what turns a program into the graph that is run; set before the first call.
    """

    def __init__(
        self,
        name: str,
        dense: ExportedProgram,
        sparse: ExportedProgram | None,
        spec: StateSpec | None,
        config: Svg2Config,
        sites: Sequence[SiteReport],
        time: TimeSource,
        graph_report: GraphReport,
        conditions: Sequence[str] | None = None,
        worths: Sequence[Worth] = (),
    ) -> None:
        self.name = name
        self.dense = dense
        self.sparse = sparse
        self.config = config
        self.sites = tuple(sites)
        self.time = time
        self.graph_report = graph_report
        self.worths = tuple(worths)
        self.signature = CallSignature(dense, conditions)
        self.spec = None if spec is None else self._flat_spec(spec)
        self.make_graph: MakeGraph = ExportedGraph.of
        self._graphs: dict[str, CompiledGraph] = {}
        # A block exported alone does not know which layer of a model it is.
        self.session = Session(config.replace(dense_layers=0) if graph_report.regional else config)
        self._program: DenoisingProgram | None = None

    @property
    def run_time_options(self) -> tuple[str, ...]:
        """The options that :meth:`with_options` may change."""
        has_budget = self.spec is not None and self.spec.has_budget
        return (*RUN_TIME_OPTIONS, "density") if has_budget else RUN_TIME_OPTIONS

    @property
    def sparse_sites(self) -> list[SiteReport]:
        return [site for site in self.sites if site.decision == "sparse"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step: arguments and result as those of the exported model.

        Raises:
            ExportError: an argument is missing, unknown, or of another structure, type, shape, dtype or device.
        """
        if self._program is None:
            self._program = self.denoiser(self.session)
        return self.run(self._program, args, kwargs)

    def run(self, program: DenoisingProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call ``program``, made by :meth:`denoiser`, with the arguments of the exported model."""
        inputs = self.signature.flatten(args, kwargs)
        with torch.no_grad():
            return self.signature.unflatten(program(*inputs))

    def denoiser(self, session: Session) -> DenoisingProgram:
        """The graphs at work in a session: clock, centroids and history are the session's, compiled code is shared."""
        names = [leaf.name for leaf in self.signature.leaves if not leaf.is_constant]
        positions = [index for index, name in enumerate(names) if name in self.time.inputs]
        return DenoisingProgram(
            name=self.name,
            session=session,
            dense=self._graph("dense", self.dense),
            sparse=self._graph("sparse", self.sparse) if self.sparse is not None else None,
            spec=self.spec,
            time_reader=TimeReader(self.time.kind, positions),
            sites=self.sites,
            graph_report=self.graph_report,
            worths=self.worths,
        )

    def report(self) -> Report:
        """What was decided, and what ran."""
        if self._program is None:
            return Report(sites=list(self.sites), graphs=[self.graph_report])
        return report_of([self.session])

    def reset(self) -> None:
        """Drop all centroids; the next call begins a video."""
        self.session.reset()

    def with_options(self, options: Mapping[str, Any]) -> TransformedProgram:
        """The same graphs and weights with other run-time options, and state of its own.

        Raises:
            ConfigError: an option is unknown, out of range, or part of the graphs.
        """
        valid = self.run_time_options
        for name, (given, _) in canonical_names(options).items():
            if name not in valid:
                raise ConfigError(
                    f"{given}: is part of the graphs of a transformed program. Valid here: {', '.join(valid)}; for "
                    "others transform again."
                )
        config = self.config.replace(**options)
        if "density" in options and config.selection()[1] is None:
            raise ConfigError(
                f"density={options['density']!r}: a mass would decide, which is part of the graphs of a transformed "
                "program. Valid here: a fraction in (0, 1], or a schedule."
            )
        changed = TransformedProgram(
            *(self.name, self.dense, self.sparse, self.spec, config, self.sites, self.time),
            *(self.graph_report, self.signature.conditions, self.worths),
        )
        if "inner_backend" not in options:
            changed.make_graph = self.make_graph
        return changed

    def __repr__(self) -> str:
        return f"TransformedProgram({self.name}: {len(self.sparse_sites)} of {len(self.sites)} attentions sparse)"

    def _graph(self, which: str, program: ExportedProgram) -> CompiledGraph:
        if which not in self._graphs:
            self._graphs[which] = self.make_graph(which, program, self.config)
        return self._graphs[which]

    def _flat_spec(self, spec: StateSpec) -> StateSpec:
        """The spec with inputs and outputs counted as the run time sees them: weights inside, mutations in place."""
        outputs = [s for s in self.dense.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
        inputs = [leaf for leaf in self.signature.leaves if not leaf.is_constant]
        return replace(spec, num_inputs=len(inputs), num_outputs=len(outputs))


def check_transformed(program: Any, name: str = "program") -> TransformedProgram:
    """``program``, if it is what transform and load return.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(program, TransformedProgram):
        raise TypeError(
            f"{name}: expected what svg2_compile.transform or svg2_compile.load returns, got {type(program).__name__}"
        )
    return program
