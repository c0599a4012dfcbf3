"""The attentions that are measured: one self-attention of four published video models, and tiny stand-ins."""

from __future__ import annotations

from dataclasses import replace

from bench.shape import Shape, default_shape

__all__ = ["SHAPES", "shapes_for"]


# Spreads with which top_p 0.9 keeps 25 to 30 % of the pairs.
_PUBLISHED = (
    Shape("wan2.1-14b-720p", 40, 75_600, 0, 128, 300, 1000, 2.4),
    Shape("hunyuanvideo-720p", 24, 118_800, 256, 128, 400, 1000, 2.6),
    default_shape("wan2.1-1.3b-480p", 12, 32_760, 128, 2.4),
    default_shape("ltx-8k", 32, 8_192, 64, 2.2),
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
