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

__all__ = ["RANKS_DIFFER", "Talking", "Terms", "agreed"]

RANKS_DIFFER = "ranks_differ"
"""Why a graph is dense that is sparse as far as this rank is concerned."""

# Options that make no rank run another graph than the others.
_PRIVATE = frozenset({"dump_dir", "strict", "inner_backend", "inductor_mode"})


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed on. sparse: every rank may run the sparse graph. differing: in what ranks differ, in words."""

    sparse: bool
    differing: str = ""


_ALONE = Terms(True)  # of a program that talks to no other rank


class Talking(Protocol):
    """What is known here of a program that talks to other ranks (see DenoisingProgram)."""

    number: int
    name: str
    groups: tuple[str, ...]
    terms: Terms | None
    sites: tuple[SiteReport, ...]

    @property
    def can_be_sparse(self) -> bool:
        """Whether there is a sparse graph, and it has not failed."""

    def prepare(self) -> None:
        """Compile the sparse graph now."""


def agreed(program: Talking, located: tuple[Request, Standing] | None, config: Svg2Config, once: Once) -> Terms:
    """What the ranks that ``program`` talks to agreed on for the video of a call. Every rank has to ask for it.

    Args:
        program: which graph is called.
        located: the request of the call and where it stands, None where nobody tells.
        config: the options of this rank.
        once: says what differs.
    """
    if not program.groups:
        return _ALONE
    first = program.terms
    # Graphs that are not sparse everywhere stay dense for good: nothing is exchanged any more.
    if first is not None and (not first.sparse or located is None):
        return first
    known: Terms | None = None if located is None else located[0].terms.get(program.number)
    if known is None:
        program.prepare()
        known = _compared(program, _facts(program, located, config), once)
        program.terms = first or known
        if located is not None:
            located[0].terms[program.number] = known
    return known


def _facts(program: Talking, located: tuple[Request, Standing] | None, config: Svg2Config) -> dict[str, Any]:
    """What has to be equal on all ranks, by name: options, what became of every attention, where the call stands."""
    options = [field.name for field in dataclasses.fields(config) if field.name not in _PRIVATE]
    facts: dict[str, Any] = {name: repr(getattr(config, name)) for name in options}
    facts |= {site.name: f"{site.decision} ({site.reason})" for site in program.sites}
    if located is not None:
        facts |= {"step": located[1].step, "num_steps": located[1].num_steps}
    return facts


def _compared(program: Talking, facts: Mapping[str, Any], once: Once) -> Terms:
    """One group after the other, so that all groups know of all."""
    terms = Terms(program.can_be_sparse)
    for group in program.groups:
        terms = _combined(_gathered(group, (torch.distributed.get_rank(), dict(facts), terms)))
    if terms.differing:
        once.warning(
            f"{RANKS_DIFFER} {terms.differing}",
            "%s runs dense on all ranks, because they differ in %s. Give every rank the same options, versions and "
            "kind of device.",
            *(program.name, terms.differing),
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
