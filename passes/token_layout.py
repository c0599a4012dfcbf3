"""Analysis: where the positions of every axis of every tensor in a graph come from.

An abstract interpretation: the graph runs on fresh fake tensors (no data, no gradients) under a dispatch mode that
carries `axes.Axis` values by the rules of `layout.rules`. Because it works at the dispatcher, it serves Dynamo's
torch-level graphs and ATen graphs of torch.export alike, also inside a Dynamo backend call.

    hidden_states [1, 4, 2, 16, 16] -> conv3d -> flatten -> transpose -> linear -> query
    the token axis of query: one segment of 128 positions that derive from {hidden_states}

Guarantees: graph and metadata are not changed, no guard is added, symbolic lengths stay symbolic, and an operator
without a rule makes its outputs unknown (and is counted) instead of guessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import sympy
from torch import fx

from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.layout.axes import MIXED, UNKNOWN, Axes, Axis, Factor, Inside, Segment, collapse, make_axis
from svg2_compile.passes.layout.interpreter import Interpretation, interpret
from svg2_compile.passes.layout.latent import find_latent
from svg2_compile.passes.layout.lengths import exact_quotient
from svg2_compile.passes.layout.marks import Picked
from svg2_compile.passes.layout.mode import AttentionAxes
from svg2_compile.passes.layout.picked import pick_of
from svg2_compile.passes.layout.reshape import reshape


@dataclass(frozen=True, slots=True)
class TokenLayouts:
    """The result of the analysis.

    `latent`: the input whose positions are the video's. `inputs`: the placeholders that are no parameters or buffers.
    `attentions`: token axes of every attention met. `unruled_ops`: how often an operator without a rule was met.
    `picks`: for tensors whose first axis was picked by places, the axis that it was picked from, and the places.
    """

    axes: dict[fx.Node, Axes]
    latent: frozenset[str]
    inputs: frozenset[str]
    attentions: tuple[AttentionAxes, ...]
    unruled_ops: Counter[str] = field(default_factory=Counter)
    picks: dict[fx.Node, tuple[Axis, fx.Node]] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Axes | None:
        """The axes of the tensor that `node` yields; None where it yields no tensor."""
        return self.axes.get(node)

    def segments(self, node: fx.Node, dim: int, sequences: int = 1) -> Factor | None:
        """Axis `dim` of the tensor of `node` as one concatenation; None where that is unknown or not expressible.

        `sequences`: the axis holds so many equal sequences one after the other; what is asked for is one of them.
        """
        axes = self.axes.get(node)
        return None if axes is None else segments_of(axes[dim], sequences)

    def why_unknown(self, node: fx.Node) -> str:
        """In words: where the positions of a tensor were lost, and the way out."""
        unknown = "it could not be shown where the tokens come from"
        names = [str(name) for name, _ in self.unruled_ops.most_common(3)]
        if names:
            way_out = "Reshape, cut and join tokens by operators of PyTorch's instead"
            return f"{unknown}; not followed: {', '.join(names)}. {way_out}"
        names = self._lost_at(node)
        if names:
            return f"{unknown}; lost at {', '.join(names)}. Keep the tokens of the video together, in their order"
        return f"{unknown}: compile the whole model, where the video is an input, or keep its tokens in one piece"

    def _lost_at(self, node: fx.Node) -> list[str]:
        """The operators before `node` whose outputs have an unknown axis though none of their inputs has one."""
        names: dict[str, None] = {}
        seen, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            inputs = [n for n in current.all_input_nodes if not self._is_known(n)]
            if not inputs and current.op in ("call_function", "call_method") and not self._is_known(current):
                names[operator_name(current)] = None
            waiting += [n for n in inputs if n not in seen]
            seen.update(inputs)
        return list(names)

    def _is_known(self, node: fx.Node) -> bool:
        return all(axis.known for axis in self.axes.get(node, ()))


def segments_of(axis: Axis, sequences: int = 1) -> Factor | None:
    """An axis as one concatenation, or one of its ``sequences``; None where that is unknown or not expressible."""
    whole: Axis | None = axis
    if axis.length is not None and sequences > 1:
        count = sympy.Integer(sequences)
        each = exact_quotient(axis.length, count)
        whole = None if each is None else reshape((axis,), [axis.length], [count, each])[1]
    factor = None if whole is None else collapse(whole)
    return None if factor is None or any(MIXED in segment.sources for segment in factor) else factor


def analyse_token_layout(
    gm: fx.GraphModule, parameters: Collection[str] | None = None, concrete: bool = False
) -> TokenLayouts:
    """Finds where the positions of every axis come from.

    `gm`: a graph with fake-tensor metadata (`example_value` of Dynamo, `val` of torch.export). `parameters`: names of
    the placeholders that are parameters, buffers or constants; by default they are recognised by their metadata, in
    graphs of torch.export by the prefixes that it gives (`p_`, `b_`, `c_`): pass them from the graph signature where
    there is one. `concrete`: at the sizes that were traced, which holds for no other (see specialise.py). Raises
    ValueError where a placeholder has no metadata.
    """
    return layouts_of(gm, interpret(gm, parameters, concrete))


def layouts_of(gm: fx.GraphModule, found: Interpretation) -> TokenLayouts:
    """What an interpretation of `gm` tells, once it is known which input is the video."""
    latent = find_latent(gm, found)
    settled: dict[Axis, Axis] = {}

    def settle(axis: Axis) -> Axis:
        if axis not in settled:
            settled[axis] = _settle(axis, latent)
        return settled[axis]

    axes = {node: tuple(map(settle, tensor_axes)) for node, tensor_axes in found.axes.items()}
    marks = {node: pick_of(tensor_axes[0]) for node, tensor_axes in found.axes.items() if tensor_axes}
    picks = {node: (settle(mark.axis), mark.places) for node, mark in marks.items() if mark is not None}
    attentions = tuple(
        AttentionAxes(settle(a.query), settle(a.key), a.mask_sources - {MIXED}) for a in found.attentions
    )
    return TokenLayouts(axes, latent, found.inputs, attentions, found.unruled_ops, picks)


def _settle(axis: Axis, latent: frozenset[str]) -> Axis:
    """The axis for those who ask what is video: mixed segments are context without the latent, and unknown with it."""
    segments = [segment for factor in axis.factors or () for segment in factor]
    if any(MIXED in segment.sources and segment.sources & latent for segment in segments):
        return UNKNOWN
    if not any(MIXED in segment.sources or _marks(segment.sources) for segment in segments):
        return axis
    return make_axis(
        tuple(Segment(s.sources - {MIXED} - _marks(s.sources), s.length) for s in factor)
        for factor in axis.factors or ()
    )


def _marks(sources: frozenset[str]) -> frozenset[str]:
    return frozenset(source for source in sources if isinstance(source, (Inside, Picked)))
