"""Report: every attention with its decision and reason, and what ran."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from svg2_compile.reporting.groups import grouped_sites
from svg2_compile.reporting.records import GraphReport, SiteRecord, SiteReport

if TYPE_CHECKING:
    pass

__all__ = ["Report"]


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


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
