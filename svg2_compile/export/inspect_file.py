"""What a saved program says about itself, and a picture of one rewritten attention. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from svg2_compile.export.archive import ArchiveReader
from svg2_compile.export.content import SPARSE_ENTRY
from svg2_compile.export.errors import ExportError
from svg2_compile.export.manifest import check_manifest, read_facts_of_manifest
from svg2_compile.export.serde import shape_text
from svg2_compile.reporting.graph_picture import PictureNode, to_dot, to_svg
from svg2_compile.reporting.records import SiteReport
from svg2_compile.reporting.report import Report
from svg2_compile.settings.config import Svg2Config

__all__ = ["FileFacts", "draw_site", "inspect_file"]


@dataclass(frozen=True)
class FileFacts:
    """The content of a saved program. sizes: bytes of "file", "weights", "graphs" and "machine code"."""

    path: Path
    sizes: Mapping[str, int]
    versions: Mapping[str, str]
    format_version: int
    config: Svg2Config
    report: Report
    time: Mapping[str, Any]
    state: Mapping[str, Any] | None
    compiled: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format_version": self.format_version,
            "versions": dict(self.versions),
            "bytes": dict(self.sizes),
            "config": self.config.to_dict(),
            "time": dict(self.time),
            "state": self.state,
            "compiled": self.compiled,
            **self.report.to_dict(),
        }

    def __rich__(self) -> Group:
        facts = Table(title=str(self.path), title_justify="left", show_header=False)
        written = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        facts.add_row("written by", f"{written}; format {self.format_version}")
        facts.add_row("size", ", ".join(f"{name} {_size(count)}" for name, count in self.sizes.items() if count))
        facts.add_row("options", self._options())
        inputs = ", ".join(self.time["inputs"]) or "no input"
        facts.add_row("time", f"{self.time['kind']}: {inputs}")
        if self.state is not None:
            facts.add_row("state", f"{len(self.state['slots'])} tensors of centroids, on {self.state['device']}")
        if self.compiled is not None:
            facts.add_row("machine code", f"for PyTorch {self.compiled['torch']}, {self.compiled['machine']}")
        return Group(facts, self.report.table(), *map(Text, self.report.footer()))

    def _options(self) -> str:
        """The settings that differ from the defaults."""
        defaults = Svg2Config().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != defaults[name]}
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "defaults"


def inspect_file(path: Path) -> FileFacts:
    """Read what a saved program says about itself. Checksums of weights are not verified: loading does that.

    Raises:
        ExportError: the file is damaged, none of ours, or of a newer format.
    """
    with ArchiveReader(path) as reader:
        manifest = reader.manifest
    check_manifest(manifest)
    facts = read_facts_of_manifest(manifest)
    sizes = {"file": path.stat().st_size, "weights": 0, "graphs": 0, "machine code": 0}
    for name, entry in manifest["entries"].items():
        kind = name.split("/")[0] if "/" in name else "machine code"
        sizes[kind] = sizes.get(kind, 0) + int(entry["size"])
    return FileFacts(
        path=path,
        sizes=sizes,
        versions=manifest["versions"],
        format_version=manifest["format_version"],
        config=facts["config"],
        report=Report(sites=facts["sites"], graphs=[facts["graph_report"]]),
        time=manifest["time"],
        state=manifest["state"],
        compiled=manifest.get("compiled"),
    )


def draw_site(path: Path, site: int, target: Path) -> SiteReport:
    """Draw what the attention ``site`` (from 0, among the sparse ones) was rewritten to; returns its report.

    Args:
        path: a saved program.
        site: which of the sparse attentions.
        target: the picture; its suffix says what kind: ".svg" or ".dot".

    Raises:
        ExportError: no such attention, or another suffix.
    """
    draw = {".svg": to_svg, ".dot": to_dot}.get(target.suffix)
    if draw is None:
        raise ExportError(f"graph: {target} has the suffix {target.suffix!r}. Valid: .svg, .dot.")
    reports = {report.index: report for report in inspect_file(path).report.sparse_sites}
    if site not in reports:
        valid = f"0 to {len(reports) - 1}" if reports else "none, no attention of it is sparse"
        raise ExportError(f"site: {path} has no sparse attention {site}. Valid: {valid}.")
    with ArchiveReader(path) as reader:
        graph = json.loads(reader.read(SPARSE_ENTRY))["graph_module"]["graph"]
    target.write_text(
        draw(list(_picture(graph, f"svg2_{site}_")), f"{reports[site].name}, rewritten"), encoding="utf-8"
    )
    return reports[site]


def _picture(graph: Mapping[str, Any], prefix: str) -> Iterator[PictureNode]:
    """The operators of one site, what they read, and what leaves the graph or goes on in the model."""
    shapes = {name: shape_text(meta) for name, meta in graph["tensor_values"].items()}
    operators = [node for node in graph["nodes"] if any(name.startswith(prefix) for name in _names(node["outputs"]))]
    makers = {name: _names(node["outputs"])[0] for node in operators for name in _names(node["outputs"])}
    read = dict.fromkeys(name for node in operators for name in _names(node["inputs"]) if name not in makers)
    for name in read:
        is_state = name.startswith("svg2_")
        label = name.removeprefix(prefix)
        yield PictureNode(f"in {name}", (label, shapes.get(name, "int")), (), "state" if is_state else "input")
    for node in operators:
        outputs = _names(node["outputs"])
        sources = dict.fromkeys(makers.get(name, f"in {name}") for name in _names(node["inputs"]))
        operator = node["target"].removeprefix("torch.ops.").removesuffix(".default").replace(".", "::", 1)
        yield PictureNode(outputs[0], (operator, outputs[0].removeprefix(prefix)), tuple(sources))
    for name in _names(graph["outputs"]):
        if name in makers:
            yield PictureNode(f"out {name}", (name.removeprefix(prefix), shapes[name]), (makers[name],), "output")
    outside = {name: node for node in graph["nodes"] if node not in operators for name in _names(node["inputs"])}
    for name in makers.keys() & outside.keys():
        reader = outside[name]["target"].split(".")[-2]
        yield PictureNode(f"to {name}", (reader, "the rest of the model"), (makers[name],), "input")


def _names(arguments: Any) -> list[str]:
    """The names of the values in serialised arguments."""
    found: list[str] = []
    pending = [arguments]
    while pending:
        item = pending.pop(0)
        if isinstance(item, dict):
            for key in ("as_tensor", "as_sym_int"):
                name = (item.get(key) or {}).get("name") or (item.get(key) or {}).get("as_name")
                if name:
                    found.append(name)
            pending += [value for key, value in item.items() if key in ("arg", "as_tensors", "as_ints", "as_sym_ints")]
        elif isinstance(item, list):
            pending += item
    return found


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
