"""The results in a few lines: every unit, and the goals beside what was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["summarise"]

Records = Mapping[str, dict[str, Any]]
MAIN = "wan2.1-14b-720p"


def summarise(records: Records) -> str:
    """Two tables as text: what ran, and the goals."""
    lines = ["", "unit                              status         seconds  result"]
    for name, record in records.items():
        status, seconds = record["status"], record.get("seconds", 0.0)
        lines.append(f"{name:33s} {status:13s} {seconds:8.1f}  {_headline(record)}")
    lines += ["", f"{'goal (' + MAIN + ')':58s} {'goal':>16s}  reached"]
    for label, goal, read in GOALS:
        lines.append(f"{label:58s} {goal:>16s}  {_reached(records, read)}")
    return "\n".join(lines)


def _headline(record: dict[str, Any]) -> str:
    if record["status"] != "measured":
        return str(record.get("reason") or record.get("error"))
    if "relative_errors" in record:
        return f"largest relative error {max(record['relative_errors'].values()):.1e}"
    if "variants" in record:
        dense = record["dense"]
        speedups = ", ".join(f"{label}: {variant['speedup']:.2f}x" for label, variant in record["variants"].items())
        return f"dense {dense['median_ms']:.2f} ms ({dense['kernel']}); {speedups}"
    if "peer" in record:
        ours = record["ours"]["median_ms"]
        return f"{record['median_ms']:.2f} ms, efficiency {record['efficiency']:.2f}; ours {ours:.2f} ms"
    if "sides" in record:
        return "; ".join(f"{side}: {found['ours']['iteration_ms']:.3f} ms" for side, found in record["sides"].items())
    calls = ", ".join(f"{label}: {found['speedup_of_model_call']:.2f}x" for label, found in record["sparse"].items())
    return f"dense {record['dense']['median_ms']:.1f} ms; {calls}"


def _reached(records: Records, read: Callable[[Records], str]) -> str:
    try:
        return read(records)
    except KeyError:
        return "not measured"


def _attention(records: Records, variant: str, what: str) -> Any:
    return records[f"attention {MAIN}"]["variants"][variant][what]


def _whole(records: Records, variant: str) -> str:
    found = records[f"stages {MAIN}"]["variants"][variant]
    return f"{found['speedup']:.2f}x at {found['density']:.1%} ({found['cuda_graph']['speedup']:.2f}x as a CUDA graph)"


def _kmeans(records: Records) -> str:
    sides = records[f"kmeans {MAIN}"]["sides"]
    return ", ".join(f"{side} {found['speedup_over_flash_kmeans']:.2f}x" for side, found in sides.items())


def _error(records: Records) -> str:
    ratio = _attention(records, "all kept", "relative_error_over_dense")
    return f"{_attention(records, 'all kept', 'relative_error'):.2e}, {ratio:.2f} of dense's own"


def _call(records: Records, variant: str) -> str:
    found = records[f"wan_block {MAIN}"]["sparse"][variant]
    call, video = found["speedup_of_model_call"], found["projected_for_a_video"]
    return f"{call:.2f}x of a call, projected for a video {video:.2f}x"


GOALS: tuple[tuple[str, str, Callable[[Records], str]], ...] = (
    (
        "attention kernel at 25 %: (density x dense time) / time",
        ">= 0.85, 0.95",
        lambda records: f"{_attention(records, 'density 25 %', 'efficiency'):.3f}",
    ),
    ("whole rewritten attention at 25 % against dense", ">= 2.9x, 3.3x", lambda r: _whole(r, "density 25.0%")),
    ("whole rewritten attention at 12.5 % against dense", ">= 4.8x, 5.5x", lambda r: _whole(r, "density 12.5%")),
    ("k-means iteration against flash-kmeans", ">= 1.2x", _kmeans),
    (
        "selection + order + permutation, share of dense time",
        "<= 2 %",
        lambda r: f"{r[f'stages {MAIN}']['variants']['density 25.0%']['order_permute_select_share_of_dense']:.2%}",
    ),
    (
        "host synchronisations of the whole",
        "0",
        lambda r: f"{r[f'stages {MAIN}']['variants']['density 25.0%']['host_synchronisations']}",
    ),
    (
        "workspace of the attention kernel",
        "<= 256 MiB",
        lambda r: f"{_attention(r, 'density 25 %', 'workspace_mib')} MiB",
    ),
    ("relative error against float64 with all kept", "<= dense's own", _error),
    ("model call at 29.5 % (published for a video: 1.60x)", ">= 1.60x", lambda r: _call(r, "density 29.5%")),
    ("model call at 12.9 % (published for a video: 1.89x)", ">= 1.89x", lambda r: _call(r, "density 12.9%")),
)
