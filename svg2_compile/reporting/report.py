"""Report: every attention with its decision and reason, and what ran."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from svg2_compile.kernels.triton.workspace import plan_workspace
from svg2_compile.passes.sites import Site, Skip
from svg2_compile.runtime.history import SiteRecord

if TYPE_CHECKING:
    from svg2_compile.settings.config import Svg2Config

__all__ = ["GraphReport", "Report", "SiteReport", "describe", "grouped_sites"]

SMALLEST_TILE = 32  # rows: smaller query tiles make the largest table of tiles


@dataclass(frozen=True)
class SiteReport:
    """One attention of a model.

    name: module path, such as "blocks.3.attn1". decision: "sparse" or "dense". reason: a stable code ("sparse",
    "cross_attention", "cost" ...). detail: the reason in words. Token counts are ints, or strings such as "s0*s1"
    where the graph is dynamic; None where they could not be told. predicted_speedup: of this attention over dense,
    by the cost model. workspace_mb: MiB of GPU memory for its lists of keys; None on a CPU and for dynamic sizes.
    """

    index: int
    name: str
    decision: str
    reason: str
    detail: str
    video_tokens: int | str | None
    context_tokens: int | str | None
    num_heads: int | None
    head_dim: int | None
    num_q_clusters: int | str | None = None
    num_k_clusters: int | str | None = None
    predicted_speedup: float | None = None
    graph: int = 0
    workspace_mb: float | None = None


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo or torch.export handed over, and the seconds that the passes took on it."""

    name: str
    regional: bool
    time_source: str  # "timestep", "modulation" or "none"
    pass_seconds: dict[str, float]


@dataclass
class Report:
    """What was decided about a model and what ran.

    sites: one entry for every attention found. graphs: the pieces that were analysed. graph_breaks: why a model fell
    into several pieces. runs: one record per attention and call, oldest first. store_bytes: memory of the centroids.
    """

    sites: list[SiteReport] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[SiteRecord] = field(default_factory=list)
    store_bytes: int = 0
    store_entries: int = 0

    @property
    def sparse_sites(self) -> list[SiteReport]:
        return [site for site in self.sites if site.decision == "sparse"]

    @property
    def mean_density(self) -> float | None:
        """Mean density of the sparse calls; None if none ran or none was collected."""
        densities = [run.density for run in self.runs if run.graph == "sparse" and run.density is not None]
        return sum(densities) / len(densities) if densities else None

    def density_per_step(self, video: int | None = None) -> dict[int, float]:
        """Mean density over attentions and guidance branches, by step; dense calls count as 1. Default: last video."""
        if video is None:
            video = max((run.video for run in self.runs), default=0)
        by_step: dict[int, list[float]] = {}
        for run in self.runs:
            if run.video == video and run.density is not None:
                by_step.setdefault(run.step, []).append(run.density)
        return {step: sum(values) / len(values) for step, values in sorted(by_step.items())}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object per line: first the sites ("kind": "site"), then the runs ("kind": "run")."""
        lines = [json.dumps({"kind": "site", **asdict(site)}) for site in self.sites]
        lines += [json.dumps({"kind": "run", **asdict(run)}) for run in self.runs]
        Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def __str__(self) -> str:
        columns = shutil.get_terminal_size((100, 24)).columns
        return self.render(max(60, min(columns, 100)))

    def render(self, width: int = 100) -> str:
        """The report as text, at most ``width`` columns wide. Repeated layers share a row."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.table())
        for line in self.footer():
            console.print(line, soft_wrap=False, highlight=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def table(self) -> Table:
        """The attentions as a rich table."""
        table = Table(title=f"svg2: {len(self.sparse_sites)} of {len(self.sites)} attentions sparse")
        table.add_column("attention", overflow="fold")
        table.add_column("decision")
        table.add_column("reason", overflow="fold")
        for header in ("video", "context", "heads", "speed-up"):
            table.add_column(header, justify="right")
        for name, count, site in grouped_sites(self.sites):
            table.add_row(
                f"{name} (x{count})" if count > 1 else name,
                site.decision,
                site.reason,
                _text(site.video_tokens),
                _text(site.context_tokens),
                f"{_text(site.num_heads)} x {_text(site.head_dim)}",
                "-" if site.predicted_speedup is None else f"{site.predicted_speedup:.1f}x",
            )
        return table

    def footer(self) -> list[str]:
        """What the table does not show: reasons in words, graph breaks, notes, what ran."""
        lines = []
        dense = {site.reason: site.detail for site in self.sites if site.decision == "dense" and site.detail}
        lines += [f"{reason}: {detail}" for reason, detail in dense.items()]
        if self.graph_breaks:
            lines.append(f"{len(self.graphs)} graphs, because of {len(self.graph_breaks)} graph break(s):")
            lines += [f"  - {reason}" for reason in self.graph_breaks]
        workspace = max((site.workspace_mb for site in self.sites if site.workspace_mb is not None), default=None)
        if workspace is not None:
            lines.append(f"workspace of one sparse attention on the GPU: {workspace:.0f} MiB")
        lines += self.notes
        if self.runs:
            sparse = sum(run.graph == "sparse" for run in self.runs)
            density = self.mean_density
            lines.append(
                f"ran {sparse} sparse and {len(self.runs) - sparse} dense attentions"
                + (f", mean density of the sparse ones {density:.1%}" if density is not None else "")
                + f"; centroids kept: {self.store_bytes / 2**20:.1f} MB"
            )
        return lines


def describe(
    decisions: Iterable[Site | Skip],
    graph: int = 0,
    config: Svg2Config | None = None,
    device: torch.device | None = None,
) -> list[SiteReport]:
    """Turn the compiler's decisions into plain records that hold on to no graph.

    config, device: of the model; with them the records say how much GPU memory an attention takes.
    """
    records = []
    for decision in decisions:
        record = _describe(decision, graph)
        if isinstance(decision, Site) and config is not None and device is not None and device.type == "cuda":
            record = replace(record, workspace_mb=_workspace_mb(decision, config))
        records.append(record)
    return records


def _workspace_mb(site: Site, config: Svg2Config) -> float | None:
    """What the attention kernel will plan for a site, in MiB; None where the sizes are not known yet."""
    sizes = {
        "num_groups": _count(site.batch * site.num_heads),
        "num_kv_groups": _count(site.batch * site.num_kv_heads),
        "num_queries": _count(site.num_tokens),
        "num_keys": _count(site.num_tokens),
        "num_q_blocks": _count(site.num_q_clusters + 2),
        "num_k_blocks": _count(site.num_k_clusters + 2),
    }
    known: dict[str, Any] = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if len(known) < len(sizes):
        return None
    compensate = config.compensation == "centroid"
    mean_bytes = 4 * known["num_kv_groups"] * known["num_k_blocks"] * site.head_dim if compensate else 0
    limit_bytes = config.workspace_mb << 20
    limits: dict[str, Any] = {"compensate": compensate, "mean_bytes": mean_bytes, "limit_bytes": limit_bytes}
    try:
        return plan_workspace(**known, **limits, block_m=SMALLEST_TILE).bytes / 2**20
    except ValueError:
        return None  # the operator itself says what it would need


def _describe(decision: Site | Skip, graph: int) -> SiteReport:
    if isinstance(decision, Site):
        return SiteReport(
            index=decision.index,
            name=decision.name,
            decision="sparse",
            reason="sparse",
            detail="",
            video_tokens=_count(decision.video_tokens),
            context_tokens=_count(decision.num_tokens - decision.video_tokens),
            num_heads=decision.num_heads,
            head_dim=decision.head_dim,
            num_q_clusters=_count(decision.num_q_clusters),
            num_k_clusters=_count(decision.num_k_clusters),
            predicted_speedup=decision.predicted_speedup,
            graph=graph,
        )
    return SiteReport(
        index=-1,
        name=decision.name,
        decision="dense",
        reason=decision.reason,
        detail=decision.detail,
        video_tokens=_count(decision.video_tokens),
        context_tokens=_count(decision.context_tokens),
        num_heads=decision.num_heads,
        head_dim=decision.head_dim,
        predicted_speedup=decision.predicted_speedup,
        graph=graph,
    )


def _count(value: Any) -> int | str | None:
    if value is None or isinstance(value, int):
        return value
    if getattr(value, "is_Integer", False):
        return int(value)
    return str(value)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def grouped_sites(sites: Sequence[SiteReport]) -> list[tuple[str, int, SiteReport]]:
    """Rows for layers that differ in nothing but the numbers in their names, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[SiteReport]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "#", site.name)
        facts = (site.decision, site.reason, site.video_tokens, site.context_tokens, site.num_heads, site.head_dim)
        groups.setdefault((pattern, *facts), []).append(site)
    return [(_common_name([site.name for site in group]), len(group), group[0]) for group in groups.values()]


def _common_name(names: list[str]) -> str:
    """ "blocks.0.attn1", "blocks.1.attn1" -> "blocks.0-1.attn1"."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    merged = []
    for column in zip(*parts, strict=True):
        if len(set(column)) == 1:
            merged.append(column[0])
        else:
            numbers = sorted(int(text) for text in column)
            merged.append(f"{numbers[0]}-{numbers[-1]}")
    return "".join(merged)
