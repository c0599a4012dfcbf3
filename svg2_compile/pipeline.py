"""The passes in their order, and the runner that times, checks and dumps them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from svg2_compile.logs.dumps import dump_graph
from svg2_compile.logs.logger import get_logger
from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.attention.find import find_attention
from svg2_compile.passes.balance_heads import balance_heads
from svg2_compile.passes.canonical import canonical_sites, erase_unused
from svg2_compile.passes.decide_sites import Parts, decide_call, decide_sites, numbered
from svg2_compile.passes.device_profile import DeviceProfile, profile_for
from svg2_compile.passes.graph.values import has_nested
from svg2_compile.passes.hoist_centroids import StateSpec, hoist_centroids
from svg2_compile.passes.inline_subgraphs import inline_subgraphs
from svg2_compile.passes.sites import Site, Skip
from svg2_compile.passes.sparsify import SparseSite, sparsify
from svg2_compile.passes.specialise import (
    can_specialise,
    guard_signs,
    negative_sizes,
    sizes_of,
    specialise,
    with_numbers,
)
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.time_inputs import TimeInput, modulation_inputs
from svg2_compile.passes.token_layout import TokenLayouts, analyse_token_layout
from svg2_compile.passes.worth import Worth
from svg2_compile.reporting.records import GraphReport
from svg2_compile.settings.config import Svg2Config

log = get_logger()

__all__ = ["ANALYSES", "PIPELINE", "REWRITES", "SAID", "Compilation", "Pass", "run_passes"]


@dataclass
class Compilation:
    """What the passes hand to each other.

    gm is rewritten in place; hand in a copy. regional: True if the graph is known to be one layer among many, False
    if it is known to be a whole model, None to decide by whether the timestep enters the graph. name: for messages and
    the folder of dumps. parameters: the placeholders that are weights, None to tell them by their metadata.
    video_parts: where the video is in the only attention, for passes that are told (SAID). profile:
    of the device that speed is estimated for, None for ``device``. first_dense: as of decide_sites. specialised: the
    decisions hold for the traced sizes only.
    """

    gm: fx.GraphModule
    config: Svg2Config
    device: torch.device
    regional: bool | None = None
    profile: DeviceProfile | None = None
    first_dense: Callable[[Sequence[str]], int] | None = None
    name: str = "graph"
    parameters: frozenset[str] | None = None
    video_parts: Parts | StaysDense = ()
    layouts: TokenLayouts | None = None
    time_inputs: tuple[TimeInput, ...] = ()
    calls: list[AttentionCall] = field(default_factory=list)
    unreadable: list[UnreadableAttention] = field(default_factory=list)
    decisions: list[Site | Skip] = field(default_factory=list)
    specialised: bool = False
    sparse_sites: list[SparseSite] = field(default_factory=list)
    spec: StateSpec | None = None
    pass_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def time_kind(self) -> str:
        """How time enters the graph: "timestep", "modulation", or "none"."""
        return self.time_inputs[0].kind if self.time_inputs else "none"

    @property
    def time_positions(self) -> list[int]:
        """The positions of the time inputs among the graph's inputs."""
        names = {found.name for found in self.time_inputs}
        return [i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder")) if node.name in names]

    def graph_report(self, name: str | None = None) -> GraphReport:
        """What a report says about this graph."""
        profile = self.profile or profile_for(self.device)
        return GraphReport(
            name=name or self.name,
            regional=bool(self.regional),
            time_source=self.time_kind,
            pass_seconds=dict(self.pass_seconds),
            estimated_for=f"{profile.name}: {profile.source}",
        )

    @property
    def worths(self) -> list[Worth]:
        """What is asked at run time about the sizes of a call."""
        return list(dict.fromkeys(site.worth for site in self.sites if site.worth is not None))

    @property
    def sites(self) -> list[Site]:
        return [decision for decision in self.decisions if isinstance(decision, Site)]


@dataclass(frozen=True)
class Pass:
    """A named step of the pipeline. rewrites: it changes the graph, which is then checked and dumped."""

    name: str
    run: Callable[[Compilation], None]
    rewrites: bool = False


def _token_layout(c: Compilation) -> None:
    inline_subgraphs(c.gm)
    if has_nested(c.gm):  # its sizes are no numbers, so that nothing is followed
        c.layouts = TokenLayouts({}, frozenset(), frozenset(), (), Counter({"nested tensors": 1}))
        return
    c.layouts = analyse_token_layout(c.gm, c.parameters)


def _find_attention(c: Compilation) -> None:
    c.calls, c.unreadable = find_attention(c.gm)


def _find_time_inputs(c: Compilation) -> None:
    assert c.layouts is not None
    c.time_inputs = modulation_inputs(c.layouts, c.gm)
    if c.regional is None:
        # A block compiled alone sees no timestep, and holds a few attentions.
        c.regional = c.time_kind != "timestep" and len(c.calls) <= MOST_ATTENTIONS_OF_A_BLOCK


def _decide_sites(c: Compilation) -> None:
    assert c.layouts is not None
    c.decisions = _decisions_with(c, c.layouts)
    if has_nested(c.gm):
        return
    negative = negative_sizes(c.gm)
    if can_specialise(c.gm) and (negative or _is_undecided(c.decisions)):
        _decide_by_numbers(c, negative)
    elif negative:
        c.decisions = [_of_unknown_sign(decision) for decision in c.decisions]


def _decide_said(c: Compilation) -> None:
    """Somebody says where the video is, so that no layout is followed."""
    policy = c.config.site_policy()
    c.decisions = numbered([decide_call(call, c.video_parts, policy, c.device, c.profile) for call in c.calls])


def _decide_by_numbers(c: Compilation, negative: bool) -> None:
    """Decide anew at the sizes that were traced; keep that where more becomes sparse by it."""
    numbers = sizes_of(c.gm)
    calls, unreadable = find_attention(c.gm, numbers)
    layouts = analyse_token_layout(c.gm, c.parameters, concrete=True)
    by_numbers = replace(c, calls=calls, unreadable=unreadable)
    decisions = with_numbers(_decisions_with(by_numbers, layouts, numbers), c.gm)
    if negative or _count_sites(decisions) > _count_sites(c.decisions):
        c.calls, c.unreadable, c.layouts, c.decisions, c.specialised = calls, unreadable, layouts, decisions, True
    else:  # what stays dense all the same has its reason from what is known of these sizes
        pairs = zip(c.decisions, decisions, strict=True)
        c.decisions = [new if isinstance(old, Skip) and isinstance(new, Skip) else old for old, new in pairs]


def _decisions_with(
    c: Compilation, layouts: TokenLayouts, numbers: Mapping[sympy.Symbol, Any] | None = None
) -> list[Site | Skip]:
    policy, regional = c.config.site_policy(), bool(c.regional)
    rest: dict[str, Any] = {
        "regional": regional,
        "profile": c.profile,
        "numbers": numbers,
        "first_dense": c.first_dense,
    }
    return decide_sites(c.calls, c.unreadable, layouts, policy, c.device, **rest)


_LEFT_OPEN = frozenset({"unknown_layout", "layout_mismatch", "several_sequences", "unreadable"})
"""Reasons that symbols may be to blame for."""


def _is_undecided(decisions: list[Site | Skip]) -> bool:
    return any(isinstance(decision, Skip) and decision.reason in _LEFT_OPEN for decision in decisions)


def _count_sites(decisions: list[Site | Skip]) -> int:
    return sum(isinstance(decision, Site) for decision in decisions)


def _of_unknown_sign(decision: Site | Skip) -> Site | Skip:
    if isinstance(decision, Skip):
        return decision
    return Skip(
        decision.name, "unknown_layout", "a number that may be negative, and that no guard can check, is a size"
    )


def _guard_sizes(c: Compilation) -> None:
    if c.specialised:
        specialise(c.gm)
    elif c.sites:
        guard_signs(c.gm)


def _sparsify(c: Compilation) -> None:
    _guard_sizes(c)
    orders = balance_heads(c.gm, c.sites) if c.config.balance_heads else {}
    sites = canonical_sites(c.gm, c.sites)
    c.sparse_sites = sparsify(c.gm, sites, c.config.sparsity_policy(), orders)
    erase_unused(c.gm, sites)


def _hoist_centroids(c: Compilation) -> None:
    if c.sparse_sites:
        c.spec = hoist_centroids(c.gm, c.sparse_sites, budget_input=True)


# A transformer block of an audio-video model has up to six: self, text and cross-modal attention of both streams.
MOST_ATTENTIONS_OF_A_BLOCK = 6

ANALYSES = (
    Pass("token_layout", _token_layout),
    Pass("find_attention", _find_attention),
    Pass("find_time_inputs", _find_time_inputs),
    Pass("decide_sites", _decide_sites),
)
REWRITES = (
    Pass("sparsify", _sparsify, rewrites=True),
    Pass("hoist_centroids", _hoist_centroids, rewrites=True),
)
PIPELINE = ANALYSES + REWRITES
SAID = (Pass("find_attention", _find_attention), Pass("decide_sites", _decide_said), *REWRITES)
"""For a graph of one attention whose caller says where the video is (``Compilation.video_parts``)."""


def run_passes(compilation: Compilation, passes: tuple[Pass, ...] = PIPELINE) -> Compilation:
    """Run ``passes`` in order on ``compilation`` and return it. Rewrites are checked, and dumped if dump_dir is set."""
    dump_dir = compilation.config.dump_dir
    target = Path(dump_dir) / compilation.name if dump_dir else None
    for index, step in enumerate(passes):
        if step.rewrites:
            dump_graph(target, index, step.name, compilation.gm, "before")
        begin = time.perf_counter()
        step.run(compilation)
        compilation.pass_seconds[step.name] = time.perf_counter() - begin
        if step.rewrites:
            compilation.gm.graph.lint()
            dump_graph(target, index, step.name, compilation.gm, "after")
    log.debug("%s: seconds by pass: %s", compilation.name, compilation.pass_seconds)
    return compilation
