"""What an attention costs dense and sparse, in seconds, as sympy expressions over token counts.

The floor is counted (FLOPs of the matrix products, bytes of the permutations); what a device makes of it is a
DeviceProfile (``device_profile.py``). The model decides only whether an attention is worth rewriting, so it needs to be
right about the crossover, not about the third digit.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import sympy

from svg2_compile.passes.device_profile import DeviceProfile

__all__ = [
    "CostInputs",
    "crossover_tokens",
    "dense_seconds",
    "expected_density",
    "sparse_seconds",
    "speedup",
]


# (top_p, density): published mean densities of SVG2 (algorithm: SVG2 0.9 -> 25-32 %, SVG2-Turbo 0.7 -> 13-14 %).
_DENSITY_BY_TOP_P = ((0.0, 0.05), (0.7, 0.14), (0.85, 0.25), (0.9, 0.30), (0.95, 0.45), (1.0, 1.0))


# What a pair of query centroid and key costs in error-aware routing, in pairs of attention (measured on a CPU).
_ROUTING_PAIR = 2
# What such a pair costs beyond that for the residual of first-order compensation (measured on a CPU).
_RESIDUAL_PAIR = 2


@dataclass(frozen=True)
class CostInputs:
    """One attention. video, context: tokens; ints or sympy. groups: batch * query heads. iters: k-means iterations.
    compensation: skipped clusters take part by their centroids; first_order: and with residual and slope.
    error_routing: blocks are chosen by error."""

    video: Any
    context: Any
    groups: Any
    head_dim: int
    num_q_clusters: Any
    num_k_clusters: Any
    iters: int
    density: float
    bytes_per_element: int = 2
    compensation: bool = False
    error_routing: bool = False
    first_order: bool = False


def expected_density(top_p: float, density: float | None, min_k_ratio: float) -> float:
    """The density to expect before anything has run: the budget if there is one, else interpolated in top_p."""
    if density is not None:
        return density
    for (low_p, low), (high_p, high) in itertools.pairwise(_DENSITY_BY_TOP_P):
        if top_p <= high_p:
            share = (top_p - low_p) / (high_p - low_p)
            return max(min_k_ratio, low + share * (high - low))
    return 1.0


def dense_seconds(cost: CostInputs, profile: DeviceProfile) -> Any:
    """4 N^2 D FLOPs per (batch, head)."""
    tokens = cost.video + cost.context
    return 4 * cost.groups * tokens**2 * cost.head_dim / profile.dense_flops


def sparse_seconds(cost: CostInputs, profile: DeviceProfile) -> Any:
    """k-means, permutation of Q, K, V and O, selection by error, the selected blocks, and what every call costs."""
    tokens = cost.video + cost.context
    clusters = cost.num_q_clusters + cost.num_k_clusters
    kmeans = 2 * cost.groups * cost.iters * cost.video * clusters * cost.head_dim / profile.kmeans_flops
    permute = 8 * cost.groups * tokens * cost.head_dim * cost.bytes_per_element / profile.bandwidth
    pairs = cost.density * cost.video**2 + 2 * cost.video * cost.context + cost.context**2
    if cost.compensation:
        pairs += (1 - cost.density) * cost.video * cost.num_k_clusters
    if cost.first_order:
        # The slope is a product of keys with values, and one of queries with it.
        pairs += _RESIDUAL_PAIR * cost.video * cost.num_q_clusters + cost.video * cost.head_dim
    if cost.error_routing:
        pairs += _ROUTING_PAIR * cost.video * cost.num_q_clusters
    attend = 4 * cost.groups * pairs * cost.head_dim / profile.sparse_flops
    per_head = profile.head_overhead + cost.num_q_clusters * profile.cluster_overhead
    return kmeans + permute + attend + cost.groups * per_head + profile.call_overhead


def speedup(cost: CostInputs, profile: DeviceProfile) -> Any:
    """Predicted time of dense over sparse attention."""
    return dense_seconds(cost, profile) / sparse_seconds(cost, profile)


@functools.lru_cache(maxsize=256)  # the layers of a model are alike
def crossover_tokens(cost: CostInputs, profile: DeviceProfile) -> int | None:
    """The number of video tokens from which sparse is faster, all else as in ``cost``; None if it never is.

    The cluster counts are taken as they are: close to the crossover they hardly move it.
    """
    video = sympy.Symbol("video", positive=True)
    at = CostInputs(**{**cost.__dict__, "video": video})
    gain = sympy.lambdify(video, dense_seconds(at, profile) - sparse_seconds(at, profile), "math")
    low, high = 1, 1 << 24
    if gain(high) <= 0:
        return None
    while low < high:
        middle = (low + high) // 2
        if gain(middle) > 0:
            high = middle
        else:
            low = middle + 1
    return low
