"""What is decided about an attention (a Site becomes sparse, a Skip stays dense with its reason), and by which policy.

Reason codes are stable: users read them in reports, and tests name every one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from svg2_compile.passes.attention.call import AttentionCall
from svg2_compile.passes.attention.masks import KeyPadding
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.worth import Worth

__all__ = ["Site", "SitePolicy", "Skip", "dense_layer_count", "dense_layer_detail"]


@dataclass(frozen=True)
class SitePolicy:
    """The part of the configuration that decides which attentions become sparse (see Svg2Config)."""

    min_tokens: int | str
    dense_layers: int | float
    num_q_clusters: int | None
    num_k_clusters: int | None
    step_iters: int
    top_p: float
    density: float | None
    min_k_ratio: float
    compensation: str
    routing: str


@dataclass(frozen=True)
class Site:
    """An attention that becomes sparse. Token and cluster counts are ints, or sympy expressions if symbolic.

    video_parts: start and length of every piece of the video on the token axis. Several are brought together at its
    start before they are clustered (canonical.py): video_start is 0 then, and video_tokens counts all of them.
    worth: asked at run time whether the sizes of a call are worth it; None where every size that may come is.
    too_short: why the sizes that were traced are not. dense_share: float32 [batch, 1], how much of the scores of
    a row stays dense all the same; None where nothing does.
    """

    index: int
    name: str
    call: AttentionCall
    batch: Any
    num_heads: Any
    num_kv_heads: Any
    head_dim: int
    num_tokens: Any
    video_start: Any
    video_tokens: Any
    key_padding: KeyPadding | None
    num_q_clusters: Any
    num_k_clusters: Any
    predicted_speedup: float | None
    expected_density: float | None = None
    video_parts: tuple[tuple[Any, Any], ...] = ()
    worth: Worth | None = None
    too_short: StaysDense | None = None
    dense_share: fx.Node | None = None


@dataclass(frozen=True)
class Skip:
    """An attention that stays dense. reason: a stable code; detail: in words. Numbers are None where unknown."""

    name: str
    reason: str
    detail: str
    video_tokens: Any = None
    context_tokens: Any = None
    num_heads: Any = None
    head_dim: Any = None
    predicted_speedup: float | None = None
    expected_density: float | None = None


def dense_layer_count(dense_layers: int | float, num_sites: int) -> int:
    """How many attentions over the video stay dense at the start of a model: a count, or a fraction rounded up."""
    return dense_layers if isinstance(dense_layers, int) else math.ceil(dense_layers * num_sites - 1e-9)


def dense_layer_detail(count: int, dense_layers: int | float) -> str:
    """The reason "dense_layer" in words."""
    return f"the first {count} attentions over the video stay dense (dense_layers={dense_layers})"
