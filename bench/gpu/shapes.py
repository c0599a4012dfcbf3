"""The attentions that are measured: one self-attention of four published video models, and tiny stand-ins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["SHAPES", "Shape", "shapes_for"]


@dataclass(frozen=True)
class Shape:
    """One self-attention [1, num_heads, num_tokens, head_dim] of a model.

    video_tokens are clustered; context_tokens (text) stand behind them. num_q_clusters, num_k_clusters: as published,
    or as the compiler would choose. spread: standard deviation of the logits between centroids that ``inputs.py``
    aims at; with the ones given here top_p 0.9 keeps 25 to 30 % of the pairs.
    """

    name: str
    num_heads: int
    video_tokens: int
    context_tokens: int
    head_dim: int
    num_q_clusters: int
    num_k_clusters: int
    spread: float
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_tokens(self) -> int:
        return self.video_tokens + self.context_tokens

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def flops(self, density: float = 1.0) -> float:
        """Floating-point operations of both matrix products over ``density`` of all (query, key) pairs."""
        return 4.0 * self.num_heads * density * self.num_tokens**2 * self.head_dim


_PUBLISHED = (
    Shape("wan2.1-14b-720p", 40, 75_600, 0, 128, 300, 1000, 2.4),
    Shape("hunyuanvideo-720p", 24, 118_800, 256, 128, 400, 1000, 2.6),
    Shape("wan2.1-1.3b-480p", 12, 32_760, 0, 128, 131, 436, 2.4),
    Shape("ltx-8k", 32, 8_192, 0, 64, 32, 109, 2.5),
)
SHAPES = {shape.name: shape for shape in _PUBLISHED}
# Odd numbers of tokens, so that a rehearsal meets the same partial tiles.
_TINY_TOKENS = {"wan2.1-14b-720p": 301, "hunyuanvideo-720p": 257, "wan2.1-1.3b-480p": 130, "ltx-8k": 128}


def _tiny(shape: Shape) -> Shape:
    context = min(shape.context_tokens, 9)
    return replace(
        shape,
        num_heads=2,
        video_tokens=_TINY_TOKENS[shape.name],
        context_tokens=context,
        head_dim=16,
        num_q_clusters=3,
        num_k_clusters=8,
    )


def shapes_for(rehearsal: bool) -> dict[str, Shape]:
    """The published shapes, or tiny ones under the same names."""
    return {name: _tiny(shape) if rehearsal else shape for name, shape in SHAPES.items()}
