"""A small dataflow graph as a picture: Graphviz text, or SVG drawn here, so that no program need be installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["PictureNode", "to_dot", "to_svg"]

# Pixels: a box, the gaps between boxes and between rows, the border, and a character of the 11 px monospaced font.
_HEIGHT, _GAP, _ROW_GAP, _BORDER, _CHARACTER = 36, 16, 34, 20, 6.7
_COLOURS: Mapping[str, str] = {
    "input": "#e8eef7",
    "state": "#fdf0d5",
    "operator": "#ffffff",
    "output": "#e6f4e6",
}


@dataclass(frozen=True)
class PictureNode:
    """One box. name: unique. lines: at most two lines of text. inputs: names of others. kind: a key of the colours."""

    name: str
    lines: tuple[str, ...]
    inputs: tuple[str, ...]
    kind: str = "operator"


def to_dot(nodes: Sequence[PictureNode], title: str) -> str:
    """The graph in Graphviz's language."""
    lines = [
        "digraph svg2 {",
        f"  label={_quoted(title)}; labelloc=t; rankdir=TB;",
        '  node [shape=box, style="filled,rounded", fontname=monospace, fontsize=11];',
    ]
    for node in nodes:
        lines.append(f"  {_quoted(node.name)} [label={_quoted(chr(10).join(node.lines))}, fillcolor={_colour(node)}];")
    lines += [f"  {_quoted(source)} -> {_quoted(node.name)};" for node in nodes for source in node.inputs]
    return "\n".join([*lines, "}", ""])


def to_svg(nodes: Sequence[PictureNode], title: str) -> str:
    """The graph as SVG: every node below the nodes that it reads."""
    rows = _rows(nodes)
    widths = {node.name: _CHARACTER * max(map(len, node.lines)) + 20 for node in nodes}
    row_widths = [sum(widths[node.name] + _GAP for node in row) - _GAP for row in rows]
    total = max([*row_widths, _CHARACTER * len(title) * 1.2]) + 2 * _BORDER
    places: dict[str, tuple[float, float]] = {}
    for index, row in enumerate(rows):
        x = (total - row_widths[index]) / 2
        for node in row:
            places[node.name] = (x + widths[node.name] / 2, _BORDER + 24 + index * (_HEIGHT + _ROW_GAP))
            x += widths[node.name] + _GAP
    height = 2 * _BORDER + 24 + len(rows) * (_HEIGHT + _ROW_GAP) - _ROW_GAP
    body = [f'<text x="{total / 2:.0f}" y="{_BORDER + 4}" font-size="13">{escape(title)}</text>']
    body += [line for node in nodes for line in _edges(node, places)]
    body += [line for node in nodes for line in _box(node, places[node.name], widths[node.name])]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{height}" '
            'font-family="monospace" font-size="11" text-anchor="middle">',
            '<defs><marker id="arrow" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
            '<path d="M0,0 L6,3 L0,6 z" fill="#888"/></marker></defs>',
            f'<rect width="{total:.0f}" height="{height}" fill="#fafafa"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _rows(nodes: Sequence[PictureNode]) -> list[list[PictureNode]]:
    """Nodes by their longest path from an input; within a row near what they read."""
    level: dict[str, int] = {}
    for node in nodes:  # in the order of the graph, so that inputs come first
        level[node.name] = 1 + max((level[source] for source in node.inputs if source in level), default=-1)
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node.name)
    for node in reversed(nodes):  # an input stands right above the first node that reads it
        if not node.inputs and readers.get(node.name):
            level[node.name] = min(level[reader] for reader in readers[node.name]) - 1
    rows: list[list[PictureNode]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for node in nodes:
        rows[level[node.name]].append(node)
    position: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda node: _mean(position[source] for source in node.inputs if source in position))
        position.update({node.name: index - len(row) / 2 for index, node in enumerate(row)})
    return rows


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


def _edges(node: PictureNode, places: Mapping[str, tuple[float, float]]) -> list[str]:
    x, y = places[node.name]
    paths = []
    for source in node.inputs:
        from_x, from_y = places[source]
        start, middle = from_y + _HEIGHT, (from_y + _HEIGHT + y) / 2
        curve = f"M{from_x:.0f},{start:.0f} C{from_x:.0f},{middle:.0f} {x:.0f},{middle:.0f} {x:.0f},{y - 1:.0f}"
        paths.append(f'<path d="{curve}" fill="none" stroke="#888" marker-end="url(#arrow)"/>')
    return paths


def _box(node: PictureNode, place: tuple[float, float], width: float) -> list[str]:
    x, y = place
    colour = _COLOURS.get(node.kind, "#ffffff")
    lines = [
        f'<rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{_HEIGHT}" rx="5" fill="{colour}" '
        'stroke="#666"/>'
    ]
    first = y + _HEIGHT / 2 + 4 - 6.5 * (len(node.lines) - 1)
    for index, text in enumerate(node.lines):
        weight = ' font-weight="bold"' if index == 0 and node.kind == "operator" else ""
        lines.append(f'<text x="{x:.0f}" y="{first + 13 * index:.0f}"{weight}>{escape(text)}</text>')
    return lines


def _colour(node: PictureNode) -> str:
    return _quoted(_COLOURS.get(node.kind, "#ffffff"))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
