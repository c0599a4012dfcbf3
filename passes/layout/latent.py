"""Which input of a graph is the video: the one whose positions the output has.

A denoiser returns a tensor of its latent's shape, up to the channels. A piece of a model (one block, or what is between
two graph breaks) may return text, audio and intermediate tensors besides, so every output names a candidate with the
number of its positions, and the longest wins. Where no output tells, the longest segment on any attention's query axis
does.

Beside it stand other inputs with space and time axes of their own ([B, C, F, H, W]): reference and history frames,
control videos. Where their positions are tokens, they are tokens of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.axes import Axes, Axis, Factor, collapse
from svg2_compile.passes.layout.interpreter import Interpretation
from svg2_compile.passes.layout.lengths import known_number, same_length

_VIDEO_RANK = 5
_BATCHED_RANK = 3
"""From this rank on, the first axis is taken for the batch: every input of a model shares it, so it tells nothing."""

Sizes = Sequence[sympy.Expr]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An input that may be the latent. Compared by positions first, then by how well its shape fits."""

    name: str
    positions: sympy.Expr
    positions_in_example: int
    same_channels: bool

    def beats(self, other: _Candidate | None) -> bool:
        """Whether this candidate, met later than `other`, is the better one."""
        if other is None:
            return True
        if not same_length(self.positions, other.positions):
            return self.positions_in_example > other.positions_in_example
        return self.same_channels and not other.same_channels


def find_latent(gm: fx.GraphModule, found: Interpretation) -> frozenset[str]:
    """The names of the video's placeholder and of those like it; empty where neither outputs nor attentions tell."""
    best: _Candidate | None = None
    for candidate in _candidates_of_outputs(gm, found):
        if candidate.beats(best):
            best = candidate
    if best is None:
        for attention in found.attentions:
            for candidate in _candidates_of_axis(attention.query, gm, found):
                if candidate.beats(best):
                    best = candidate
    return frozenset() if best is None else frozenset({best.name}) | _other_videos(gm, found)


def _other_videos(gm: fx.GraphModule, found: Interpretation) -> frozenset[str]:
    placeholders = [node for node in gm.graph.find_nodes(op="placeholder") if node.name in found.inputs]
    return frozenset(n.name for n in placeholders if len(found.sizes.get(n, ())) >= _VIDEO_RANK and _is_float(n))


def _candidates_of_outputs(gm: fx.GraphModule, found: Interpretation) -> Iterator[_Candidate]:
    (output,) = gm.graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        if node not in found.axes or not _is_float(node):
            continue
        shaped = list(_candidates_by_shape(found.axes[node], found.sizes[node], gm, found))
        yield from shaped
        # Of [B, N, C] a text of as many channels has the shape, too; the longer axis wins.
        if len(found.axes[node]) == _BATCHED_RANK or (not shaped and len(found.axes[node]) > _BATCHED_RANK):
            for d in _positions(found.axes[node]):
                yield from _candidates_of_axis(found.axes[node][d], gm, found)


def _candidates_by_shape(axes: Axes, sizes: Sizes, gm: fx.GraphModule, found: Interpretation) -> Iterator[_Candidate]:
    """The inputs of an output's shape whose positions it carries on an axis that is not the batch."""
    sources = frozenset[str]().union(*(axes[d].sources for d in _positions(axes)))
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name not in sources or node not in found.sizes:
            continue
        own = found.sizes[node]
        differing = [d for d in range(len(sizes)) if len(own) == len(sizes) and not same_length(own[d], sizes[d])]
        if len(own) != len(sizes) or len(differing) > 1:
            continue
        shared = [sizes[d] for d in _positions(axes) if d not in differing and node.name in axes[d].sources]
        count = sympy.Mul(*shared)
        yield _Candidate(node.name, count, _in_example(count, found), not differing)


def _candidates_of_axis(axis: Axis, gm: fx.GraphModule, found: Interpretation) -> Iterator[_Candidate]:
    """For every segment of a token axis the input that it is made of most likely."""
    segments: Factor = collapse(axis) or ()
    for index, segment in enumerate(segments):
        elsewhere = frozenset[str]().union(*(s.sources for i, s in enumerate(segments) if i != index))
        name = _most_elements(segment.sources - elsewhere or segment.sources, gm, found)
        if name is not None:
            yield _Candidate(name, segment.length, _in_example(segment.length, found), False)


def _most_elements(names: frozenset[str], gm: fx.GraphModule, found: Interpretation) -> str | None:
    """Tokens have more elements than what is added to all of them (rotary embeddings, time steps); else the first."""
    best: tuple[int, str] | None = None
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name in names and node in found.sizes and _is_float(node):
            elements = _in_example(sympy.Mul(*found.sizes[node]), found)
            if best is None or elements > best[0]:
                best = (elements, node.name)
    return None if best is None else best[1]


def _is_float(node: fx.Node) -> bool:
    dtype = getattr(node_value(node), "dtype", None)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def _positions(axes: Sequence[Axis]) -> range:
    """The axes that are not the batch."""
    return range(1 if len(axes) >= _BATCHED_RANK else 0, len(axes))


def _in_example(length: sympy.Expr, found: Interpretation) -> int:
    # Which input is the video does not depend on its size, so an example may tell; reading it this way adds no guard.
    known = {symbol: found.example_of.get(symbol, sympy.Integer(1)) for symbol in length.free_symbols}
    return known_number(length, known) or 0
