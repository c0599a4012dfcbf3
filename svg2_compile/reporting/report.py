"""Report: every attention with its decision and reason, and what ran."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from svg2_compile.reporting.groups import grouped_sites
from svg2_compile.reporting.measured import Summary, by_layer, by_step, layers_table, steps_table
from svg2_compile.reporting.records import GraphReport, SiteRecord, SiteReport

if TYPE_CHECKING:
    pass

__all__ = ["Report"]

NAME_WIDTH = len("single_transformer_blocks.0-39.attn")
WIDEST_WORD = len("attention")  # of the usual reasons, which break between words


@dataclass
class Report:
    """What was decided about a model and what ran.

    sites: one entry for every attention found. graphs: the pieces that were analysed. graph_breaks: why a model fell
    into several pieces. dense_layers: those that have graphs of their own and stay dense by ``dense_layers``. runs: one
    record per attention and call, oldest first. store_bytes: memory of the centroids.
    """

    sites: list[SiteReport] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dense_layers: list[str] = field(default_factory=list)
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
        steps: dict[int, list[float]] = {}
        for run in self._of_video(video):
            if run.density is not None:
                steps.setdefault(run.step, []).append(run.density)
        return {step: sum(values) / len(values) for step, values in sorted(steps.items())}

    def by_step(self, video: int | None = None) -> list[Summary]:
        """Density asked and got, and the measured error, of every step with sparse calls. Default: last video."""
        return by_step(self._of_video(video))

    def by_layer(self, video: int | None = None) -> list[Summary]:
        """The same of every attention with sparse calls."""
        return by_layer(self._of_video(video))

    def _of_video(self, video: int | None) -> list[SiteRecord]:
        if video is None:
            video = max((run.video for run in self.runs), default=0)
        return [run for run in self.runs if run.video == video]

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
        for table in (steps_table(self._of_video(None)), layers_table(self._of_video(None))):
            if table is not None:
                console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def table(self) -> Table:
        """The attentions as a rich table, at most 80 columns wide for names of up to NAME_WIDTH columns.

        Names break at dots only. Where room is short, reasons take several lines.
        """
        table = Table(
            title=f"svg2: {len(self.sparse_sites)} of {len(self.sites)} attentions sparse",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("attention", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        table.add_column("decision", min_width=WIDEST_WORD)
        for header in ("tokens", "density", "faster"):
            table.add_column(header, justify="right", no_wrap=True)
        for name, count, site in grouped_sites(self.sites):
            sparse = site.decision == "sparse"
            table.add_row(
                _broken_at_dots(name),
                str(count),
                "sparse" if sparse else f"dense: {site.reason.replace('_', ' ')}",
                _tokens(site),
                f"{site.expected_density:.0%}" if sparse and site.expected_density is not None else "-",
                "-" if site.predicted_speedup is None else f"{site.predicted_speedup:.1f}x",
            )
        return table

    def footer(self) -> list[str]:
        """What the table does not show: reasons in words, graph breaks, notes, what ran."""
        lines = []
        dense = {site.reason: site.detail for site in self.sites if site.decision == "dense" and site.detail}
        lines += [f"{reason}: {detail}" for reason, detail in dense.items()]
        lines += dict.fromkeys(f"sparse, {site.detail}" for site in self.sparse_sites if site.detail)
        if self.graph_breaks:
            lines.append(f"{len(self.graphs)} graphs, because of {len(self.graph_breaks)} graph break(s):")
            lines += [f"  - {reason}" for reason in self.graph_breaks]
        lines += self._estimates()
        workspace = max((site.workspace_mb for site in self.sites if site.workspace_mb is not None), default=None)
        if workspace is not None:
            lines.append(f"workspace of one sparse attention on the GPU: {workspace:.0f} MiB")
        if self.dense_layers:
            lines.append(f"stay dense by dense_layers: {', '.join(self.dense_layers)}")
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

    def _estimates(self) -> list[str]:
        """What the numbers of the table are: heads, and for which device speed was predicted."""
        shapes = dict.fromkeys(
            f"{site.num_heads} x {site.head_dim}" for site in self.sites if site.num_heads is not None
        )
        lines = [f"heads x head_dim: {', '.join(shapes)}"] if shapes else []
        devices = dict.fromkeys(graph.estimated_for for graph in self.graphs if graph.estimated_for)
        if devices and any(site.predicted_speedup is not None for site in self.sites):
            lines.append(f"speed-up of the attention alone, predicted for {'; '.join(devices)}")
        return lines


def _broken_at_dots(name: str) -> str:
    """A module path in lines of at most NAME_WIDTH columns, as far as its parts allow."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_WIDTH:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _tokens(site: SiteReport) -> str:
    """ "75600", or "75600+512" with context; "-" where it is not known where the video is."""
    if site.video_tokens is None:
        return "-"
    return f"{site.video_tokens}" + (f"+{site.context_tokens}" if site.context_tokens not in (None, 0) else "")
