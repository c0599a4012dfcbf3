"""What is decided about an attention (a Site becomes sparse, a Skip stays dense with its reason), and by which policy.

Reason codes are stable: users read them in reports, and tests name every one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svg2_compile.passes.attention.call import AttentionCall
from svg2_compile.passes.attention.masks import KeyPadding

__all__ = ["Site", "SitePolicy", "Skip", "StaysDense"]


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
    """An attention that becomes sparse. Token and cluster counts are ints, or sympy expressions if symbolic."""

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


class StaysDense(Exception):
    """Why an attention stays dense, raised where that is found. numbers: fields of the Skip that are known by then."""

    def __init__(self, reason: str, detail: str, **numbers: Any) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.numbers = numbers
