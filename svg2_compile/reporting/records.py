"""Plain records of what was decided and what ran. They hold on to no graph and no tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["GraphReport", "SiteRecord", "SiteReport"]


@dataclass(frozen=True)
class SiteReport:
    """One attention of a model.

    name: module path, such as "blocks.3.attn1". decision: "sparse" or "dense". reason: a stable code ("sparse",
    "cross_attention", "cost" ...). detail: the reason in words. Token counts are ints, or strings such as "s0*s1"
    where the graph is dynamic; None where they could not be told. predicted_speedup: of this attention over dense,
    by the cost model. expected_density: the share of the keys that it will attend to, as far as that can be told before
    anything has run. workspace_mb: MiB of GPU memory for its lists of keys; None on a CPU and for dynamic sizes.
    """

    index: int
    name: str
    decision: str
    reason: str
    detail: str
    video_tokens: int | str | None
    context_tokens: int | str | None
    num_heads: int | None
    head_dim: int | None
    num_q_clusters: int | str | None = None
    num_k_clusters: int | str | None = None
    predicted_speedup: float | None = None
    graph: int = 0
    workspace_mb: float | None = None
    expected_density: float | None = None

    def left_dense(self, detail: str) -> SiteReport:
        """The same attention, where dense_layers leaves it dense; ``detail``: that in words."""
        changes: dict[str, Any] = {"decision": "dense", "reason": "dense_layer", "detail": detail, "index": -1}
        changes |= dict.fromkeys(("num_q_clusters", "num_k_clusters", "workspace_mb"))  # of sparse attentions
        return replace(self, **changes)


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo or torch.export handed over, and the seconds that the passes took on it.

    estimated_for: the device that speed-ups were predicted for, and where its figures come from.
    """

    name: str
    regional: bool
    time_source: str  # "timestep", "modulation" or "none"
    pass_seconds: dict[str, float]
    estimated_for: str = ""


@dataclass(frozen=True)
class SiteRecord:
    """One attention in one call: density is selected (query, key) pairs / all pairs, per head; 1.0 where dense.
    density_asked: what selection was to meet, among the video's tokens; None where a mass decides, and where dense.
    error: ||out - dense|| / ||dense|| of a few rows of every head; None where it was not measured."""

    site: str
    video: int
    step: int
    context: int
    layer: int
    graph: str  # "sparse" or "dense"
    reason: str  # why this graph: "sparse", "dense_steps", "dense_layers", "no_timestep" ...
    iters: int  # k-means iterations; 0 where dense
    seeded: bool  # started from the centroids of an earlier step
    density: float | None  # mean over batch and heads; None if not collected
    density_per_head: tuple[tuple[float, ...], ...] | None = None
    request: str = ""  # whose denoising loop
    branch: str = ""  # the model call in the step: a number, or the name that it goes by
    density_asked: float | None = None
    error: float | None = None
    error_per_head: tuple[tuple[float, ...], ...] | None = None
    source: str = ""  # who told the step: "context", "scheduler", "timestep" or "modulation"

    def to_json(self) -> str:
        return json.dumps(self.__dict__)
