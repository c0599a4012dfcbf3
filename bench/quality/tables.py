"""The tables of docs/quality.md, from the JSON files in bench/results.

    python -m bench.quality.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is there is replaced.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import BENCH, RESULTS, markdown
from bench.quality.results import (
    ATTENTION,
    FIRST_ORDER,
    FIRST_ORDER_LAYERS,
    FIRST_ORDER_SIZES,
    GUARD,
    SPEED,
    STAGES,
    VIDEO,
    read_results,
)
from bench.quality.tables_first_order import layers_table, parts_table, psnr_table, schedules_table, sizes_table
from bench.quality.tables_guard import guard_table
from bench.quality.tables_stages import added_table, stages_table

__all__ = [
    "attention_tables",
    "cluster_count_table",
    "fill",
    "reuse_table",
    "routing_table",
    "speed_table",
    "video_table",
]

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""What a table shows of a result, by the column's name."""
PAGE = BENCH.parent / "docs" / "quality.md"
RECALL_ROWS = {
    "oracle_tokens": "best keys of every query",
    "svg2": "svg2",
    "svg2 oracle": "best of the same clusters",
    "tiles": "tiles",
    "raster": "raster",
}
COUNT_COLUMNS = ("recall", "svg2 error", "svg2+comp error", "svg2+comp+ear error")
ESTIMATES = {
    "score": 'softmax mass (`routing="score"`)',
    "squares": "sum of the squared errors of single keys (published)",
    "error": 'squared sum of the keys\' errors (`routing="error"`)',
    "oracle": "the same of a sample of 1,024 queries, not of the centroids",
}


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def attention_tables(document: Mapping[str, Any]) -> str:
    """A table for everything in the summary: a column per layer and one for their mean."""
    summary = document["summary"]
    header = ["", *(f"layer {row['layer']}" if row["layer"] != "all" else "mean" for row in summary)]
    size = f"{counted(len(document['prompts']), 'prompt')}, {document['size']} pixels, {document['tokens']:,} tokens"
    clusters = f"{document['num_q_clusters']} query and {document['num_k_clusters']} key clusters"
    parts = [f"{size}, {clusters}, {document['sampling_steps']} steps, commit {document['environment']['commit']}."]
    for what in (key for key in summary[0] if key != "layer"):
        names = RECALL_ROWS if what.startswith("recall") else {name: name for name in summary[0][what]}
        rows = [[label, *(f"{row[what][name]:.3f}" for row in summary)] for name, label in names.items()]
        title = what.replace("error", "output error").replace("%", " %")
        parts += [f"**{title[0].upper()}{title[1:]} density**", markdown(header, rows)]
    return "\n\n".join(parts)


def reuse_table(document: Mapping[str, Any]) -> str:
    """Recall and density by start and iterations, mean over the steps after the first."""
    later = [row for row in document["reuse"] if row["age"] > 0]
    rows = []
    for start, iters in dict.fromkeys((row["start"], row["iters"]) for row in later):
        chosen = [row for row in later if (row["start"], row["iters"]) == (start, iters)]
        means = [float(np.mean([row[what] for row in chosen])) for what in ("recall_fixed", "density_top_p")]
        rows.append([start, str(iters), *(f"{value:.3f}" for value in means)])
    return markdown(["centroids", "iterations per step", "recall at 25 %", "density at top-p 0.9"], rows)


def cluster_count_table(document: Mapping[str, Any]) -> str:
    """Recall and error at 15 and 25 % by number of clusters."""
    what = [f"{name} at {density}" for name in COUNT_COLUMNS for density in ("15%", "25%")]
    rows = [
        [f"{row['num_q_clusters']}, {row['num_k_clusters']}", *(f"{row[name]:.3f}" for name in what)]
        for row in document["more_clusters"]
    ]
    return markdown(["query, key clusters", *(name.replace("%", " %") for name in what)], rows)


def routing_table(document: Mapping[str, Any]) -> str:
    """Output error by what blocks are ranked with, and how far it lies below ranking by mass, in dB."""
    columns = [name for name in document["routing"][0] if name.startswith("error at")]
    by_mass = next(row for row in document["routing"] if row["ranked_by"] == "score")
    rows = [
        [ESTIMATES[row["ranked_by"]]]
        + [f"{row[name]:.3f} ({20 * np.log10(by_mass[name] / row[name]):+.1f} dB)" for name in columns]
        for row in document["routing"]
    ]
    return markdown(["blocks ranked by", *(name.replace("%", " %") for name in columns)], rows)


def video_table(document: Mapping[str, Any]) -> str:
    """PSNR and SSIM of every method at every budget, and of the selections by mass."""
    columns: Columns = {
        "PSNR, dB": lambda row: f"{row['psnr_mean']:.1f} ± {row['psnr_std']:.1f}",
        "SSIM": lambda row: f"{row['ssim_mean']:.3f}",
        "multi-scale SSIM": lambda row: f"{row['ms_ssim_mean']:.3f}",
    }
    return f"{_about_videos(document)}; mean ± deviation over videos.\n\n{_points(document, columns)}"


def speed_table(document: Mapping[str, Any]) -> str:
    """PSNR and the speed-up of a step, of every method at every budget."""
    columns: Columns = {
        "PSNR, dB": lambda row: f"{row['psnr_mean']:.1f}",
        "dense step": lambda row: f"{row['dense_step']['median_ms'] / 1e3:.1f} s",
        "sparse step": lambda row: f"{row['sparse_step']['median_ms'] / 1e3:.1f} s",
        "speed-up": lambda row: f"{row['speedup']:.2f}x",
        "slowest to fastest": lambda row: "{:.2f} to {:.2f}x".format(*row["speedup_range"]),
    }
    where = f"torch {document['environment']['torch']}, commit {document['environment']['commit']}"
    return f"{_about_videos(document)}; {where}.\n\n{_points(document, columns)}"


def _points(document: Mapping[str, Any], columns: Columns) -> str:
    """A row per method and selection, with these columns."""
    rows = [[row["method"], _selection(row), *(show(row) for show in columns.values())] for row in document["results"]]
    return markdown(["method", "selection", *columns], rows)


def _about_videos(document: Mapping[str, Any]) -> str:
    size = f"{document['frames']}x{document['height']}x{document['width']} pixels, {document['tokens']:,} tokens"
    return f"{counted(len(document['jobs']), 'video')} of {size}, {document['steps']} steps"


def _selection(row: Mapping[str, Any]) -> str:
    return f"top_p {row['top_p']}: {row['density']:.1%}" if "top_p" in row else f"density {row['density']:.1%}"


def fill(page: str, name: str, table: str) -> str:
    """``page`` with the table called ``name`` replaced. Raises ValueError where the page has no such table."""
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no table {name!r}; valid: {', '.join(re.findall('table: ([a-z]+)', page))}")
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


TABLES: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    ATTENTION: {
        "attention": attention_tables,
        "clusters": cluster_count_table,
        "reuse": reuse_table,
        "routing": routing_table,
    },
    VIDEO: {"video": video_table},
    SPEED: {"speed": speed_table},
    FIRST_ORDER: {"psnr": psnr_table, "parts": parts_table, "schedules": schedules_table},
    FIRST_ORDER_LAYERS: {"layers": layers_table},
    FIRST_ORDER_SIZES: {"sizes": sizes_table},
    GUARD: {"guard": guard_table},
    STAGES: {"stages": stages_table, "added": added_table},
}
"""The tables made from each result file, by their mark on the page."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.tables")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    page = options.page.read_text()
    for name, tables in TABLES.items():
        document = read_results(options.results, name)
        if document is None:
            raise SystemExit(f"no {name}.json in {options.results}")
        for mark, table in tables.items():
            page = fill(page, mark, table(document))
    options.page.write_text(page)
    print(options.page)


if __name__ == "__main__":
    main()
