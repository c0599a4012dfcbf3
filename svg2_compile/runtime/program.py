"""DenoisingProgram: a dense graph, the sparse graph made from it, and the state that is carried between calls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from svg2_compile.codegen.compiled_graph import CompiledGraph
from svg2_compile.codegen.symbols import SymbolBinder
from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.graph.collectives import rank_groups
from svg2_compile.passes.hoist_centroids import StateSpec
from svg2_compile.passes.sites import dense_layer_detail
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.worth import Worth
from svg2_compile.reporting.records import GraphReport, SiteReport
from svg2_compile.runtime.agreement import Terms
from svg2_compile.runtime.balance import initial_orders, rebalanced
from svg2_compile.runtime.budgets import late_copy, which_are_given_up
from svg2_compile.runtime.history import CallRecord, Measured, qualified
from svg2_compile.runtime.layers import LayerTable
from svg2_compile.runtime.plan import CallPlan, running_plan
from svg2_compile.runtime.session import Session
from svg2_compile.runtime.time_reader import TimeReader

__all__ = ["DenoisingProgram"]

log = get_logger()

_numbers = itertools.count()
_MOST_SCALARS = 256
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
        worths: what is asked at every new size; all must agree for the sparse graph to run.
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
        worths: Sequence[Worth] = (),
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
        self._worths = tuple(worths)
        self._asked = sorted(frozenset().union(*(worth.symbols for worth in worths)), key=str)
        self._too_short: dict[tuple[int, ...], str | None] = {}
        self._scalars: dict[tuple[torch.dtype, bool | float], torch.Tensor] = {}
        self._tokens: tuple[int, ...] | None = None
        self._failed = False
        lengths = [site.video_tokens for site in sites if site.decision == "sparse"]
        self.video_tokens = frozenset(length for length in lengths if isinstance(length, int))
        # The groups of ranks that the graph exchanges tensors with, and what was agreed on with them at the first call.
        self.groups = tuple(group.name for group in rank_groups(dense.gm) if group.size > 1)
        self.terms: Terms | None = None
        session.programs.add(self)

    @property
    def can_be_sparse(self) -> bool:
        """Whether there is a sparse graph, and it has not failed."""
        return self.sparse is not None and not self._failed

    def site_reports(self) -> list[SiteReport]:
        """Every attention of the graph; where it serves known layers, every attention of each of them."""
        labels = self.layers.labels()
        if not labels:
            return list(self.sites)
        dense = self.session.dense_layer_names() if self.regional else []
        detail = dense_layer_detail(len(dense), self.session.config.dense_layers)
        left = [site.left_dense(detail) if site.decision == "sparse" else site for site in self.sites]
        return [
            replace(site, name=qualified(label, site.name))
            for label in labels
            for site in (left if label in dense else self.sites)
        ]

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
            if self.groups:
                raise self._other_ranks_wait(error) from error
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

    def too_short(self, args: Sequence[Any]) -> str | None:
        """The reason why the attentions stay dense at the sizes of these inputs; None if they are worth it."""
        if not self._worths:
            return None
        numbers = tuple(self._binder.read(symbol, args) for symbol in self._asked)
        if numbers not in self._too_short:
            self._too_short[numbers] = self._ask(dict(zip(self._asked, numbers, strict=True)))
        return self._too_short[numbers]

    def _ask(self, sizes: Mapping[sympy.Symbol, int]) -> str | None:
        try:
            for worth in self._worths:
                worth.gain(sizes)
        except StaysDense as dense:
            log.info("%s stays dense at these sizes (%s): %s", self.name, dense.reason, dense.detail)
            return dense.reason
        return None

    def prepare(self) -> None:
        """Compile the sparse graph now. Where that fails, the dense one runs from now on."""
        if self.sparse is None or self._failed:
            return
        try:
            self.sparse.compile()
        except Exception as error:
            if self.session.config.strict:
                raise
            self._failed = True
            self.session.watch.graph_failed(self.name, error)

    def _other_ranks_wait(self, error: Exception) -> RuntimeError:
        """What is raised where this rank has already exchanged tensors: the dense graph would exchange them again."""
        return RuntimeError(
            f"rank {torch.distributed.get_rank()}: the sparse graph of {self.name} failed with {type(error).__name__}: "
            f"{error}. The other ranks are in the middle of it, so that this one cannot run dense instead. End all "
            "ranks (torchrun does); svg2_compile.disable(pipe) on all of them runs dense."
        )

    def _run_dense(self, plan: CallPlan, args: Sequence[Any]) -> Any:
        if self._failed:
            plan = replace(plan, sparse=False, reason="failed")
        self._record(plan, iters=0, seeded=False)
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
        if carried is not None and self._are_given_up(carried, plan):
            return self._run_dense(replace(plan, sparse=False, reason="target_error"), args)
        num_slots = len(spec.slots)
        state = carried[:num_slots] if carried is not None else self._cold_state(spec, shapes)
        orders = carried[num_slots : num_slots + len(spec.orders)] if carried is not None else initial_orders(spec)
        asked = self.session.density(plan)
        budget = (self._scalar(float(asked)),) if spec.has_budget and asked is not None else ()
        with running_plan(plan):
            outputs = graph(*args, *state, self._scalar(seeded), iters, *budget, *orders)
        added = self._keep(outputs[spec.num_outputs :])
        new_state, measured = added[:num_slots], added[num_slots:]
        if standing is not None and not standing.is_last:
            if spec.orders and not seeded:
                new_state, orders = rebalanced(spec, new_state, measured, orders)
            budgets = [tensor for tensor, slot in zip(new_state, spec.slots, strict=True) if slot.role == "budget"]
            store.put(
                *(standing.video, plan.layer, key),
                [*new_state, *orders, *([late_copy(budgets)] if budgets else [])],
            )
        self._record(plan, iters, seeded, self._measured(spec, state, measured, asked))
        return outputs[: spec.num_outputs]

    def _cold_state(self, spec: StateSpec, shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.full(shape, slot.start, dtype=torch.float32, device=spec.device)
            for shape, slot in zip(shapes, spec.slots, strict=True)
        )

    def _are_given_up(self, carried: Sequence[torch.Tensor], plan: CallPlan) -> bool:
        """Whether all attentions of the graph have missed their target for good; those that have are told of."""
        assert self.spec is not None
        sites = [self._site_names[slot.site_index] for slot in self.spec.slots if slot.role == "budget"]
        if not sites:
            return False
        given_up = which_are_given_up(carried[-1])
        for position in given_up:
            self.session.watch.target_missed(
                qualified(plan.layer.label, sites[position]), self.session.config.target_error
            )
        return len(given_up) == len(self._site_names)

    def _measured(
        self, spec: StateSpec, state: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], asked: float | None
    ) -> dict[str, Measured]:
        """By attention, what a sparse call tells of itself; tensors: the outputs behind the state."""
        densities = dict(zip(spec.density_sites, tensors, strict=False))
        rest = tensors[len(spec.density_sites) :]
        errors = dict(zip(spec.error_sites, zip(rest[::2], rest[1::2], strict=True), strict=True))
        budgets = {
            slot.site_index: tensor for slot, tensor in zip(spec.slots, state, strict=True) if slot.role == "budget"
        }
        return {
            name: Measured(densities.get(index), asked, budgets.get(index), *errors.get(index, (None, None)))
            for index, name in self._site_names.items()
        }

    def _token_shapes(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The shapes of all inputs that are no weights. Which these are is the same in every call."""
        if self._tokens is None:
            self._tokens = tuple(
                index
                for index, arg in enumerate(args)
                if isinstance(arg, torch.Tensor) and not isinstance(arg, torch.nn.Parameter)
            )
        return tuple(tuple(args[index].shape) for index in self._tokens)

    def _keep(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs that outlive the call: copies where the next replay of a CUDA graph would overwrite them."""
        overwritten = self.session.config.inductor_mode in _CUDA_GRAPH_MODES
        return [tensor.clone() if overwritten else tensor.detach() for tensor in tensors]

    def _scalar(self, value: bool | float) -> torch.Tensor:
        """bool or float32 [] on the device, made without waiting for it."""
        assert self.spec is not None
        dtype = torch.bool if isinstance(value, bool) else torch.float32
        key = (dtype, value)  # True equals 1.0
        if key not in self._scalars:
            if len(self._scalars) >= _MOST_SCALARS:
                self._scalars.clear()
            # Not an inference tensor, so that one serves calls in and out of inference_mode.
            with torch.inference_mode(False):
                self._scalars[key] = torch.full((), value, dtype=dtype, device=self.spec.device)
        return self._scalars[key]

    def _record(self, plan: CallPlan, iters: int, seeded: bool, measured: Mapping[str, Measured] | None = None) -> None:
        self.session.history.append(
            CallRecord(
                sites=tuple(self._site_names.values()),
                standing=plan.standing,
                layer=plan.layer.ordinal,
                graph="sparse" if plan.sparse else "dense",
                reason=plan.reason,
                iters=iters,
                seeded=seeded,
                measured=measured or {},
                label=plan.layer.label,
            )
        )
