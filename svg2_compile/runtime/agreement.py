"""What the ranks of a process group decide together, so that no two of them run different graphs.

Tokens that are exchanged in the middle of a graph (Ulysses) need all ranks to be in the same one. What decides which
that is, options and what became of every attention, is on every rank, and is compared: when a graph is first called,
and where it is sparse, at its first call in every video. The sparse graph is compiled by then, so that it is known
whether it can be. A rank for which something differs makes all of them dense.

One exchange of a few hundred bytes for each video and graph; none in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from svg2_compile.logs.logger import Once
from svg2_compile.passes.graph.collectives import process_group
from svg2_compile.reporting.records import SiteReport
from svg2_compile.runtime.request import Request
from svg2_compile.runtime.standing import Standing
from svg2_compile.settings.config import Svg2Config

__all__ = ["RANKS_DIFFER", "Terms", "agree", "agreed_on"]

RANKS_DIFFER = "ranks_differ"
"""Why a graph is dense that is sparse as far as this rank is concerned."""

# Options that make no rank run another graph than the others.
_PRIVATE = frozenset({"dump_dir", "strict", "inner_backend", "inductor_mode"})


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed on. sparse: every rank may run the sparse graph. differing: in what ranks differ, in words."""

    sparse: bool
    differing: str = ""


def _option_facts(config: Svg2Config) -> dict[str, str]:
    """The options that decide what runs, by name."""
    return {
        field.name: repr(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _PRIVATE
    }


def agree(groups: Sequence[str], facts: Mapping[str, Any], sparse: bool, name: str, once: Once) -> Terms:
    """Compare ``facts`` among the ranks of ``groups``, one group after the other. Every rank of them has to call it.

    Args:
        groups: names of process groups, as functional collectives have them.
        facts: what has to be equal, by name.
        sparse: whether this rank could run the sparse graph.
        name: of the graph, for messages.
        once: says what differs.
    """
    terms = Terms(sparse)
    for group in groups:
        terms = _combined(_gathered(group, (torch.distributed.get_rank(), dict(facts), terms)))
    if terms.differing:
        once.warning(
            f"{RANKS_DIFFER} {terms.differing}",
            "%s runs dense on all ranks, because they differ in %s. Give every rank the same options, versions and "
            "kind of device.",
            *(name, terms.differing),
        )
    return terms


def _gathered(group: str, mine: Any) -> list[Any]:
    distributed = torch.distributed
    resolved = process_group(group)
    answers: list[Any] = [None] * distributed.get_world_size(resolved)
    distributed.all_gather_object(answers, mine, group=resolved)
    return answers


def _combined(answers: Sequence[tuple[int, Mapping[str, Any], Terms]]) -> Terms:
    known = next((terms.differing for _, _, terms in answers if terms.differing), "")
    first_rank, first, first_terms = answers[0]
    found = []
    for rank, facts, terms in answers[1:]:
        names = [key for key in (*first, *(facts.keys() - first.keys())) if first.get(key) != facts.get(key)]
        found += [f"{key} (rank {first_rank}: {first.get(key)}, rank {rank}: {facts.get(key)})" for key in names]
        if not names and terms.sparse != first_terms.sparse:
            dense = rank if first_terms.sparse else first_rank
            found.append(f"what became of the sparse graph (rank {dense} has none that runs)")
    differing = known or "; ".join(found[:3])
    return Terms(not differing and all(terms.sparse for _, _, terms in answers), differing)


class Exchanging(Protocol):
    """What is to be known here of a program whose graph exchanges tensors."""

    number: int
    name: str
    sites: tuple[SiteReport, ...]
    groups: tuple[str, ...]
    terms: Terms | None

    @property
    def sparse(self) -> Any:
        """The sparse graph, if there is one."""

    @property
    def failed(self) -> bool:
        """Whether the sparse graph does not run any more."""

    def prepare(self) -> None:
        """Compile the sparse graph now."""


def agreed_on(program: Exchanging, located: tuple[Request, Standing] | None, config: Svg2Config, once: Once) -> Terms:
    """What the ranks that ``program`` talks to agreed on for the video of a call; asked once for each."""
    if not program.groups:
        return Terms(True)
    first = program.terms
    # Graphs that are not sparse everywhere stay dense for good: nothing is exchanged any more.
    if first is not None and (not first.sparse or located is None):
        return first
    known = None if located is None else located[0].terms.get(program.number)
    if known is None:
        program.prepare()
        able = program.sparse is not None and not program.failed
        known = agree(program.groups, _facts(program, located, config), able, program.name, once)
        program.terms = first or known
        if located is not None:
            located[0].terms[program.number] = known
    return known


def _facts(program: Exchanging, located: tuple[Request, Standing] | None, config: Svg2Config) -> dict[str, Any]:
    facts: dict[str, Any] = _option_facts(config)
    facts |= {site.name: f"{site.decision} ({site.reason})" for site in program.sites}
    if located is not None:
        facts |= {"step": located[1].step, "num_steps": located[1].num_steps}
    return facts
