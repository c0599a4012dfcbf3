"""The compiler's decisions as records for a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from svg2_compile.kernels.triton.workspace import plan_workspace
from svg2_compile.passes.sites import Site, Skip
from svg2_compile.reporting.records import SiteReport

if TYPE_CHECKING:
    from svg2_compile.settings.config import Svg2Config

__all__ = ["describe"]

_QUANTISED = "in the place of {}, which is quantised by design; dense steps run it as it is"
SMALLEST_TILE = 32  # rows: smaller query tiles make the largest table of tiles


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
    compensate = config.compensation != "none"
    mean_bytes = 4 * known["num_kv_groups"] * known["num_k_blocks"] * site.head_dim if compensate else 0
    if config.compensation == "first_order":  # a bias for every pair of clusters
        mean_bytes += 4 * known["num_groups"] * known["num_q_blocks"] * known["num_k_blocks"]
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
            detail=_detail(decision),
            video_tokens=_count(decision.video_tokens),
            context_tokens=_count(decision.num_tokens - decision.video_tokens),
            num_heads=decision.num_heads,
            head_dim=decision.head_dim,
            num_q_clusters=_count(decision.num_q_clusters),
            num_k_clusters=_count(decision.num_k_clusters),
            predicted_speedup=decision.predicted_speedup,
            expected_density=decision.expected_density,
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
        expected_density=decision.expected_density,
        graph=graph,
    )


def _detail(site: Site) -> str:
    if getattr(site.call, "quantised", False):
        return _QUANTISED.format(site.call.form)
    if site.worth is None:
        return ""
    short = "" if site.too_short is None else f"; dense at those of the first call: {site.too_short.detail}"
    return f"where the sizes of a call are worth it{short}"


def _count(value: Any) -> int | str | None:
    if value is None or isinstance(value, int):
        return value
    if getattr(value, "is_Integer", False):
        return int(value)
    return str(value)
