"""What every rank of a pool does; every check returns plain values or raises."""

from __future__ import annotations

from typing import Any

import torch

import svg2_compile
from tests.distributed.models import parallel_build, split
from tests.support import IDENTITY, SELECTION, assert_close


def diffusers_alone(name: str) -> float:
    """The largest difference that diffusers itself makes between one process and several."""
    expected = parallel_build(name).run(steps=2)
    actual = split(parallel_build(name), name).run(steps=2)
    return (actual - expected).abs().max().item() / expected.abs().max().item()


def difference(name: str, options: dict[str, Any], regional: bool = False, **degrees: Any) -> dict[str, Any]:
    """Two videos on all ranks, compared with dense attention in one process and with the same options there."""
    small = parallel_build(name)
    dense = small.run(steps=3)
    with svg2_compile.enable(small.pipe, regional=regional, **options):
        alone = small.run(steps=3)
    small = split(parallel_build(name), name, **degrees)
    with svg2_compile.enable(small.pipe, regional=regional, **options) as enabled:
        first, second = small.run(steps=3), small.run(steps=3)
        report = enabled.report()
    scale = dense.abs().max().item()
    return {
        "dense": (first - dense).abs().max().item() / scale,
        "alone": (first - alone).abs().max().item() / scale,
        "second": (first - second).abs().max().item() / scale,
        "runs": [(run.site, run.step, run.graph, run.reason) for run in report.runs],
        "sites": [(site.name, site.decision, site.reason, site.video_tokens, site.num_heads) for site in report.sites],
        "notes": report.notes,
    }
