"""DenoisingProgram: a dense graph, the sparse graph made from it, and the state that is carried between calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.codegen.symbols import SymbolBinder
from svg2_compile.passes.hoist_centroids import StateSpec
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.runtime.history import CallRecord, qualified
from svg2_compile.runtime.layers import LayerTable
from svg2_compile.runtime.session import CallPlan, Session, running_plan
from svg2_compile.runtime.time_reader import TimeReader

__all__ = ["DenoisingProgram"]

_numbers = itertools.count()
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class DenoisingProgram:
    """What a door returns: called like the dense graph, runs the dense or the sparse one.

    Args:
        name: for messages.
        session: clock, centroids and history, shared with the other graphs of the model.
        dense: the graph as it came in, untouched.
        sparse: the rewritten graph; None if no attention of it is sparse.
        spec: how the sparse graph is called; None with ``sparse``.
        time_reader: reads time from the inputs of the graph.
        sites: every attention of the graph with its decision.
        graph_report: facts about the graph; a regional one serves one layer among many, so that dense_layers is
            decided at each call.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        dense: CompiledGraph,
        sparse: CompiledGraph | None,
        spec: StateSpec | None,
        time_reader: TimeReader,
        sites: Sequence[SiteReport],
        graph_report: GraphReport,
    ) -> None:
        self.number = next(_numbers)
        self.name = name
        self.session = session
        self.dense = dense
        self.sparse = sparse
        self.spec = spec
        self.time_reader = time_reader
        self.sites = tuple(sites)
        self.graph_report = graph_report
        self.regional = graph_report.regional
        self._site_names = {site.index: site.name for site in sites if site.decision == "sparse"}
        self.layers = LayerTable(session.layers, tuple(self._site_names.values()))
        # The sparse graph begins with the inputs of the dense one, and its state is spelled in its own symbols.
        self._binder = SymbolBinder((sparse or dense).gm)
        self._flags: dict[bool, torch.Tensor] = {}
        self._tokens: tuple[int, ...] | None = None
        self._failed = False
        session.programs.add(self)

    def site_reports(self) -> list[SiteReport]:
        """Every attention of the graph; where it serves known layers, every attention of each of them."""
        labels = self.layers.labels()
        if not labels:
            return list(self.sites)
        return [replace(site, name=qualified(label, site.name)) for label in labels for site in self.sites]

    def __call__(self, *args: Any) -> Any:
        if self.sparse is None or self.spec is None:
            self.session.ran_dense(self, args)
            return self.dense(*args)
        plan = self.session.plan(self, args)
        if not plan.sparse or self._failed:
            return self._run_dense(plan, args)
        try:
            return self._run_sparse(self.sparse, self.spec, plan, args)
        except Exception as error:
            self.session.fail(plan)
            if self.session.config.strict:
                raise
            self._failed = True
            self.session.watch.graph_failed(self.name, error)
        except BaseException:  # an interrupt
            self.session.fail(plan)
            raise
        return self._run_dense(plan, args)

    def run_dense(self, args: Sequence[Any], reason: str) -> Any:
        """Run the dense graph for a reason that the caller knows."""
        if self.sparse is None:
            return self(*args)
        return self._run_dense(self.session.plan(self, args, reason), args)

    def _run_dense(self, plan: CallPlan, args: Sequence[Any]) -> Any:
        if self._failed:
            plan = replace(plan, sparse=False, reason="failed")
        self._record(plan, iters=0, seeded=False, densities={})
        return self.dense(*args)

    def _run_sparse(self, graph: CompiledGraph, spec: StateSpec, plan: CallPlan, args: Sequence[Any]) -> Any:
        config, store, standing = self.session.config, self.session.store, plan.standing
        shapes = self._binder.shapes([slot.shape for slot in spec.slots], args)
        carried = None
        if standing is not None:
            key = (standing.branch, shapes, self._token_shapes(args))
            carried = store.fetch(standing.video, plan.layer, key, last=standing.is_last)
        seeded = carried is not None
        iters = config.step_iters if seeded else config.init_iters
        state = carried or tuple(torch.zeros(shape, dtype=torch.float32, device=spec.device) for shape in shapes)
        with running_plan(plan):
            outputs = graph(*args, *state, self._flag(seeded), iters)
        end = spec.num_outputs + len(spec.slots)
        if standing is not None and not standing.is_last:
            store.put(standing.video, plan.layer, key, self._keep(outputs[spec.num_outputs : end]))
        densities = {
            self._site_names[index]: density for index, density in zip(spec.density_sites, outputs[end:], strict=True)
        }
        self._record(plan, iters, seeded, densities)
        return outputs[: spec.num_outputs]

    def _token_shapes(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The shapes of all inputs that are no weights. Which these are is the same in every call."""
        if self._tokens is None:
            self._tokens = tuple(
                index
                for index, arg in enumerate(args)
                if isinstance(arg, torch.Tensor) and not isinstance(arg, torch.nn.Parameter)
            )
        return tuple(tuple(args[index].shape) for index in self._tokens)

    def _keep(self, centroids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Centroids to carry to the next step: copies where the next replay of a CUDA graph would overwrite them."""
        overwritten = self.session.config.inductor_mode in _CUDA_GRAPH_MODES
        return [tensor.clone() if overwritten else tensor.detach() for tensor in centroids]

    def _flag(self, seeded: bool) -> torch.Tensor:
        assert self.spec is not None
        if seeded not in self._flags:
            # Not an inference tensor, so that one flag serves calls in and out of inference_mode.
            with torch.inference_mode(False):
                self._flags[seeded] = torch.tensor(seeded, device=self.spec.device)
        return self._flags[seeded]

    def _record(self, plan: CallPlan, iters: int, seeded: bool, densities: dict[str, torch.Tensor]) -> None:
        self.session.history.append(
            CallRecord(
                sites=tuple(self._site_names.values()),
                standing=plan.standing,
                layer=plan.layer.ordinal,
                graph="sparse" if plan.sparse else "dense",
                reason=plan.reason,
                iters=iters,
                seeded=seeded,
                densities=densities,
                label=plan.layer.label,
            )
        )
