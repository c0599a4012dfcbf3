"""Density by layer, step and head, from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg2_compile.reporting.records import SiteRecord
from svg2_compile.reporting.report import Report

__all__ = ["DensityTable", "density_table", "sparse_steps"]

LEFT_DENSE = ("dense_layer", "dense_layers")
"""Reasons of attentions that would be sparse, were they not among the first layers."""


@dataclass(frozen=True)
class DensityTable:
    """Selected (query, key) pairs / all pairs.

    Attributes:
        layers: paths of the attentions over the video.
        num_steps: denoising steps.
        values: float64 [layers, steps, heads], means over videos in the batch and guidance branches; 1 where dense,
            NaN for heads that a layer does not have.
        sparse: bool [layers, steps]: whether the sparse graph ran.
    """

    layers: tuple[str, ...]
    num_steps: int
    values: Tensor
    sparse: Tensor

    @property
    def mean_sparse(self) -> float | None:
        """Mean over the sparse attentions; None if there were none."""
        return _mean(self.values[self.sparse])

    @property
    def mean_overall(self) -> float | None:
        """Mean over all attentions over the video, dense steps and layers included."""
        return _mean(self.values)

    def by_step(self) -> list[float | None]:
        """Means over layers and heads."""
        return [_mean(self.values[:, step]) for step in range(self.num_steps)]

    def by_layer_and_step(self) -> list[list[float | None]]:
        """Means over heads."""
        return [[_mean(heads) for heads in steps] for steps in self.values]

    def by_layer_and_head(self) -> list[list[float | None]]:
        """Means over the sparse steps; 1 for layers that were always dense."""
        rows = []
        for values, sparse in zip(self.values, self.sparse, strict=True):
            chosen = values[sparse] if sparse.any() else values
            rows.append([_mean(column) for column in chosen.T])
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "mean_sparse": self.mean_sparse,
            "mean_overall": self.mean_overall,
            "layer_step_head": [[[_number(v) for v in heads] for heads in steps] for steps in self.values.tolist()],
        }


def density_table(report: Report, num_steps: int) -> DensityTable:
    """Arrange what ran, for a report of one video of ``num_steps`` steps."""
    layers = [site.name for site in report.sites if site.decision == "sparse" or site.reason in LEFT_DENSE]
    layers = list(dict.fromkeys(layers))
    heads = max((site.num_heads or 1 for site in report.sites if site.name in layers), default=1)
    total = torch.zeros(len(layers), num_steps, heads, dtype=torch.float64)
    count = torch.zeros(len(layers), num_steps, 1, dtype=torch.float64)
    sparse = torch.zeros(len(layers), num_steps, dtype=torch.bool)
    rows = {layer: row for row, layer in enumerate(layers)}
    for run in report.runs:
        row = rows.get(run.site)
        if row is None or run.step >= num_steps:
            continue
        total[row, run.step] += _per_head(run, heads)
        count[row, run.step] += 1
        sparse[row, run.step] |= run.graph == "sparse"
    # A layer left dense inside a graph has no records of its own.
    values = torch.where(count > 0, total / count.clamp(min=1), torch.ones_like(total))
    return DensityTable(tuple(layers), num_steps, values, sparse)


def _per_head(run: SiteRecord, heads: int) -> Tensor:
    if run.graph != "sparse":
        return torch.ones(heads, dtype=torch.float64)
    densities = torch.full((heads,), math.nan, dtype=torch.float64)
    if run.density_per_head:
        measured = torch.tensor(run.density_per_head, dtype=torch.float64).mean(0)
        densities[: len(measured)] = measured
    return densities


def _mean(values: Tensor) -> float | None:
    mean = values.nanmean().item() if values.numel() else math.nan
    return _number(mean)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def sparse_steps(table: DensityTable) -> Sequence[int]:
    """The steps in which any attention was sparse."""
    return [step for step in range(table.num_steps) if table.sparse[:, step].any()]
