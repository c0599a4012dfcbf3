"""Which input of a graph is the video: the one whose positions the output has.

A denoiser returns a tensor of its latent's shape, up to the channels. Where a piece of a model returns nothing like an
input, the longest segment on the query axis of any attention is taken for the video.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import fx

from svg2_compile.passes.axes import Axes, Axis, collapse, same_length
from svg2_compile.passes.layout_interpreter import Interpretation

_BATCHED_RANK = 3
"""From this rank on, the first axis is taken for the batch: every input of a model shares it, so it tells nothing."""


def latent_of_outputs(gm: fx.GraphModule, found: Interpretation) -> frozenset[str]:
    """The input whose shape an output has, channels aside, and whose positions it carries; the longest wins."""
    placeholders = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    best: tuple[sympy.Expr, str] | None = None
    for output in _output_tensors(gm, found):
        axes, sizes = found.axes[output], found.sizes[output]
        for name in sorted(_position_sources(axes)):
            candidate = placeholders[name]
            if candidate not in found.sizes or not _same_shape(found.sizes[candidate], sizes):
                continue
            count = _shared_positions(name, axes, sizes, found.sizes[candidate])
            if best is None or _longer(count, best[0]):
                best = (count, name)
    return frozenset() if best is None else frozenset({best[1]})


def latent_of_attentions(found: Interpretation) -> frozenset[str]:
    """The inputs of the longest segment on the query axis of any attention; no input where there is none."""
    best: tuple[sympy.Expr, frozenset[str]] | None = None
    for attention in found.attentions:
        for segment in collapse(attention.query) or ():
            if segment.sources and (best is None or _longer(segment.length, best[0])):
                best = (segment.length, segment.sources)
    return frozenset() if best is None else _of_longest_rank(best[1], found)


def _of_longest_rank(sources: frozenset[str], found: Interpretation) -> frozenset[str]:
    return sources


def _output_tensors(gm: fx.GraphModule, found: Interpretation) -> list[fx.Node]:
    (output,) = gm.graph.find_nodes(op="output")
    return [node for node in output.all_input_nodes if node in found.axes]


def _positions(axes: Sequence[Axis]) -> range:
    """The axes that are not the batch."""
    return range(1 if len(axes) >= _BATCHED_RANK else 0, len(axes))


def _position_sources(axes: Axes) -> frozenset[str]:
    return frozenset().union(*(axes[d].sources for d in _positions(axes)))


def _same_shape(a: Sequence[sympy.Expr], b: Sequence[sympy.Expr]) -> bool:
    """Whether two shapes agree on all axes but one at most."""
    if len(a) != len(b):
        return False
    return sum(not same_length(x, y) for x, y in zip(a, b, strict=True)) <= 1


def _shared_positions(name: str, axes: Axes, sizes: Sequence[sympy.Expr], of: Sequence[sympy.Expr]) -> sympy.Expr:
    """The number of positions that the output shares with input `name`: the product of agreeing axes that carry it."""
    shared = (sizes[d] for d in _positions(axes) if name in axes[d].sources and same_length(sizes[d], of[d]))
    return sympy.Mul(*shared)


def _longer(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a > b; where symbols leave it open, a comparison at one size for every symbol decides."""
    return bool(_at_typical_size(a) > _at_typical_size(b))


def _at_typical_size(length: sympy.Expr) -> sympy.Expr:
    # A stand-in that orders lengths without reading a hint (a hint would be a guard): all symbols equal and large.
    return length.xreplace({symbol: sympy.Integer(4096) for symbol in length.free_symbols})
