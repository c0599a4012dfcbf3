"""What is measured of one attention: recall and output error against density, and what the clusters look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bench.common import require_close
from bench.quality.capture import Attention
from bench.quality.clusters import Budget, Clustering, Side, SparseAttention
from bench.quality.exact import best_blocks, block_mass, exact_rows, recall, sampled_rows, token_recall
from svg2_compile.settings.config import Svg2Config

__all__ = ["VARIANTS", "average", "cluster_statistics", "error_curves", "interpolate", "recall_curves", "require_exact"]

VARIANTS = ("", "+comp", "+comp+ear")
"""What becomes of skipped blocks: nothing; their centroids take part; and blocks are chosen by the error of that."""
TOP_P = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOLERANCE = 2e-5  # of the largest value, float32: what bench.cpu_attention allows

Curve = dict[str, list[float]]


def recall_curves(
    attention: Attention, clusterings: Mapping[str, Clustering], densities: Sequence[float]
) -> dict[str, Any]:
    """Recall against density: selected as the compiler does ("density", "top_p") and by one who knows ("oracle")."""
    curves: dict[str, Any] = {}
    masses = block_mass(attention, list(clusterings.values()))
    for (name, clustering), mass in zip(clusterings.items(), masses, strict=True):
        sparse = SparseAttention(attention, clustering)
        maps = {
            "density": [sparse.select(Budget(density)) for density in densities],
            "top_p": [sparse.select(Budget(None, top_p, Svg2Config().min_k_ratio)) for top_p in TOP_P],
            "oracle": [best_blocks(mass, clustering, density) for density in densities],
        }
        curves[name] = {
            mode: {
                "density": [sparse.density(block_map) for block_map in block_maps],
                "recall": [recall(mass, block_map) for block_map in block_maps],
            }
            for mode, block_maps in maps.items()
        }
    curves["tokens"] = {"density": list(densities), "recall": token_recall(attention, densities)}
    return curves


def error_curves(
    attention: Attention, clusterings: Mapping[str, Clustering], densities: Sequence[float]
) -> dict[str, Curve]:
    """Output error ||out - dense|| / ||dense|| over all heads, against density: a curve per clusters and variant."""
    curves: dict[str, Curve] = {}
    for name, clustering in clusterings.items():
        sparse = SparseAttention(attention, clustering)
        for variant in VARIANTS:
            curve: Curve = {"density": [], "error": []}
            for density in densities:
                block_map = sparse.select(Budget(density), by_error=variant.endswith("ear"))
                out = sparse.attend(block_map, compensation=variant != "")
                curve["density"].append(sparse.density(block_map))
                curve["error"].append(relative_error(out, attention.dense))
            curves[name + variant] = curve
    return curves


def relative_error(out: Tensor, dense: Tensor) -> float:
    return float((out - dense).norm() / dense.norm())


def cluster_statistics(attention: Attention, clusterings: Mapping[str, Clustering]) -> dict[str, Any]:
    """Sizes and tightness of the clusters of both sides."""
    return {
        name: {
            "query": _side_statistics(attention.query, clustering.query),
            "key": _side_statistics(attention.key, clustering.key),
        }
        for name, clustering in clusterings.items()
    }


def _side_statistics(x: Tensor, side: Side) -> dict[str, float]:
    sizes = side.sizes.double()
    return {
        "size_min": float(sizes.amin(dim=2).mean()),
        "size_median": float(sizes.median(dim=2).values.mean()),
        "size_max": float(sizes.amax(dim=2).mean()),
        "empty": float((sizes == 0).sum(dim=2).double().mean()),
        "imbalance": float((sizes.amax(dim=2) / sizes.mean(dim=2)).mean()),
        "variance_within": variance_within(x, side),
    }


def variance_within(x: Tensor, side: Side) -> float:
    """Squared distance of tokens to their centroid over that to the mean of all tokens, averaged over heads."""
    squares = x.double().square().sum(dim=(2, 3))
    explained = (side.sizes.unsqueeze(-1) * side.centroids.double().square()).sum(dim=(2, 3))
    overall = x.shape[2] * x.double().mean(dim=2).square().sum(dim=2)
    return float(((squares - explained) / (squares - overall)).mean())


def require_exact(attention: Attention, clusterings: Mapping[str, Clustering]) -> float:
    """The gate: dense attention against float64 on sampled queries, and every variant with all blocks selected
    against dense. Returns the largest relative error; raises AssertionError above the tolerance."""
    rows = sampled_rows(attention, 64)
    errors = [require_close("dense", attention.dense[:, :, rows], exact_rows(attention, rows), TOLERANCE)]
    for name, clustering in clusterings.items():
        sparse = SparseAttention(attention, clustering)
        for variant in VARIANTS:
            block_map = sparse.select(Budget(1.0), by_error=variant.endswith("ear"))
            out = sparse.attend(block_map, compensation=variant != "")
            errors.append(require_close(f"{name}{variant}, all blocks", out, attention.dense, TOLERANCE))
    return max(errors)


# ------------------------------------------------------------------------------------------------- over many attentions
def average(values: Sequence[Any]) -> Any:
    """The mean of numbers; of nested dictionaries and lists of one shape, the means in that shape."""
    first = values[0]
    if isinstance(first, dict):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [average(list(items)) for items in zip(*values, strict=True)]
    return float(np.mean(values))


def interpolate(curve: Curve, what: str, density: float) -> float:
    """A curve's value at exactly ``density``: budgets end with a whole block, so that points lie a little beside."""
    limit = 1.0 if what == "recall" else 0.0
    known = sorted(zip([*curve["density"], 1.0], [*curve[what], limit], strict=True))
    return float(np.interp(density, [x for x, _ in known], [y for _, y in known]))
