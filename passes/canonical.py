"""Rewrite: a chosen attention whose tokens do not lie as sparsify reads them gets tensors whose tokens do.

Needs: sites from decide_sites on this very graph, fake metadata on its nodes.

Before (flash-attn over two sequences in one row; the video in two pieces around 24 tokens of text):

    out = flash_attn_varlen_func(query, key, value, starts, starts, ...)          [2 * 504, H, D]

After:

    query, key, value = unflatten, transpose                                       [2, H, 504, D]
    query, key, value = cat([x[240 video], x[240 video], x[24 text]])              video first, in one piece
    attended = a stand-in, which sparsify replaces
    out = cat([attended[first 240], attended[last 24], attended[second 240]])      in the order of before
    out = transpose, flatten                                                       [2 * 504, H, D]

Guarantees: attention does not depend on the order of its tokens, so that nothing else of the graph sees another one;
the replaced node has the shape, dtype and strides that it had. Sites that sparsify can read are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from svg2_compile.passes.attention.call import AttentionCall, KeyMask
from svg2_compile.passes.attention.emit_picked import Places, emit_picked, emit_places, emit_put
from svg2_compile.passes.attention.emit_rest import Rows, emit_rest, emit_rows
from svg2_compile.passes.attention.masks import KeyPadding
from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.graph.sizes import SizeEmitter, plain_size
from svg2_compile.passes.layout.lengths import same_length
from svg2_compile.passes.sites import Site

__all__ = ["canonical_sites", "erase_unused"]

_aten = torch.ops.aten
Run = tuple[Any, Any]
"""Start and length of a run of tokens: ints or sympy expressions, once emitted ints or nodes."""


def canonical_sites(gm: fx.GraphModule, sites: Sequence[Site]) -> list[Site]:
    """Rewrite the attentions of ``gm`` that sparsify cannot read, in place, and return all sites, in their order."""
    sizes = SizeEmitter(gm.graph)
    return [_SiteRewriter(gm.graph, site, sizes).rewrite() if _needs_work(site) else site for site in sites]


def erase_unused(gm: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Erase operators with several outputs whose attention was replaced: nobody reads what is left of them."""
    for site in sites:
        source = site.call.source
        if source is not None and source.graph is gm.graph and not any(user.users for user in source.users):
            for user in list(source.users):
                gm.graph.erase_node(user)
            gm.graph.erase_node(source)


def _needs_work(site: Site) -> bool:
    call = site.call
    masks = call.ends is not None or call.parted is not None or call.key_mask is not None
    return masks or call.axes == "nhd" or call.out_axes is not None or len(site.video_parts) > 1


class _SiteRewriter:
    def __init__(self, graph: fx.Graph, site: Site, sizes: SizeEmitter) -> None:
        self.site = site
        self.call = site.call
        self.anchor = site.call.node
        self.build = GraphBuilder(graph, anchor=self.anchor, prefix=f"svg2_{site.index}_")
        self.sizes = sizes
        self.runs = [self._emitted(run) for run in _video_first(site)]

    def rewrite(self) -> Site:
        call, build = self.call, self.build
        dense = build.value(self.anchor)
        places = None if call.picked is None else self._places()
        operands = self._operands() if places is None else (emit_put(build, places, n) for n in self._operands())
        query, key, value = (self._in_order(self._heads_first(n, dense.dtype), 2) for n in operands)
        rows = places if call.parted is None else emit_rows(build, call, build.size(query, 2))
        padding = self._key_padding(query, rows)
        shape = [*(build.size(query, dim) for dim in range(3)), build.size(value, 3)]
        attended = build.call(_aten.new_empty.default, query, shape, name="attention")
        out = self._heads_back(self._out_of_order(attended))
        if places is not None:
            out = emit_picked(build, call, places, out)
        elif isinstance(rows, Rows):
            out = emit_rest(build, call, rows, out)
        if dense.stride() != build.value(out).stride():
            out = build.call(_aten.contiguous.default, out)
        self.anchor.replace_all_uses_with(out)
        build.graph.erase_node(self.anchor)
        inside = AttentionCall(attended, query, key, value, scale=call.scale, form=call.form, name=call.name)
        # Everything else about the mask was decided; the nodes that it is made of are in front of this one.
        inside = replace(inside, attn_mask=None if padding is None else padding.mask, source=call.source)
        start = 0 if len(self.site.video_parts) > 1 else self.site.video_start
        share = None if rows is None else rows.dense_share
        return replace(self.site, call=inside, video_start=start, key_padding=padding, dense_share=share)

    def _operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        key = self.call.key
        if self.call.key_transposed:
            key = self.build.call(_aten.transpose.int, key, -2, -1)
        return self.call.query, key, self.call.value

    def _heads_first(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        build, call = self.build, self.call
        if call.axes == "nhd":
            node = build.call(_aten.unflatten.int, node, 0, [call.sequences, -1])
        if call.axes in ("nhd", "bnhd"):
            node = build.call(_aten.transpose.int, node, 1, 2)
        elif call.axes == "gnd":
            node = build.call(_aten.unflatten.int, node, 0, [-1, call.num_heads or 1])
        # Under autocast the dense attention casts its inputs itself; its output tells to what.
        return node if build.value(node).dtype == dtype else build.call(_aten.to.dtype, node, dtype)

    def _heads_back(self, out: fx.Node) -> fx.Node:
        build, axes = self.build, self.call.out_axes or self.call.axes
        if axes in ("nhd", "bnhd"):
            out = build.call(_aten.transpose.int, out, 1, 2)
        if axes in ("nhd", "gnd"):
            out = build.call(_aten.flatten.using_ints, out, 0, 1)
        return out

    def _emitted(self, run: Run) -> Run:
        start, length = (self.sizes.emit(plain_size(size), before=self.anchor) for size in run)
        return start, length

    def _in_order(self, node: fx.Node, dim: int) -> fx.Node:
        """The video in one piece at the start of an axis, the rest behind it."""
        if len(self.runs) == 1:
            return node
        pieces = [self.build.call(_aten.narrow.default, node, dim, start, length) for start, length in self.runs]
        return self.build.call(_aten.cat.default, pieces, dim)

    def _out_of_order(self, node: fx.Node) -> fx.Node:
        """The pieces of an axis of tokens back where they were."""
        if len(self.runs) == 1:
            return node
        lengths = [length for _, length in self.runs]
        pieces = self.build.call(_aten.split_with_sizes.default, node, lengths, 2)
        places = self.build.unpack(pieces, [f"piece_{index}" for index in range(len(lengths))])
        return self.build.call(_aten.cat.default, [places[index] for index in _order(self.site)], 2)

    def _places(self) -> Places:
        tokens, total = (sympy.sympify(self.site.num_tokens) * count for count in (1, self.call.sequences))
        sizes = (self.sizes.emit(plain_size(size), before=self.anchor) for size in (tokens, total, total - 1))
        return emit_places(self.build, self.call, *sizes)

    def _key_padding(self, query: fx.Node, rows: Rows | Places | None) -> KeyPadding | None:
        build, padding = self.build, self.site.key_padding
        if rows is not None:
            attended = self._in_order(rows.attended, 1)
            return KeyPadding(build.call(_aten.unflatten.int, attended, 1, [1, 1, -1]), "attend")
        if self.call.ends is not None:
            count = build.size(query, 2)
            places = build.call(_aten.arange.default, count, device=build.value(query).device)
            places = self._in_order(places, 0)
            end = build.call(_aten.select.int, self.call.ends, 0, 1)
            return KeyPadding(build.call(_aten.lt.Tensor, places, end, name="before_end"), "attend")
        if self.call.key_mask is not None:
            mask = self._in_order(self._masked_keys(self.call.key_mask, query), 1)
            return KeyPadding(build.call(_aten.unflatten.int, mask, 1, [1, 1, -1]), "attend")
        if padding is None or len(self.runs) == 1:
            return padding
        queries = padding.queries
        if queries is not None:
            axis = -1 if queries.transposed else -2
            queries = replace(queries, mask=self._mask_in_order(queries.mask, axis))
        return replace(padding, mask=self._mask_in_order(padding.mask, -1), queries=queries)

    def _masked_keys(self, mask: KeyMask, query: fx.Node) -> fx.Node:
        """bool [B, N]: the function that masks, on all batches and keys at once."""
        build, device = self.build, self.build.value(query).device
        shape = [build.size(query, 0), build.size(query, 2)]
        batch, keys = (build.call(_aten.arange.default, size, device=device) for size in shape)
        batch = build.call(_aten.unsqueeze.default, batch, 1)
        placeholders = mask.body.graph.find_nodes(op="placeholder")
        copies: dict[fx.Node, Any] = dict(zip(placeholders, (batch, batch, keys, keys, *mask.operands), strict=True))
        for inner in mask.body.graph.nodes:
            if inner.op in ("call_function", "call_method"):
                target = inner.target if callable(inner.target) else getattr(torch.Tensor, str(inner.target))
                args, kwargs = fx.map_arg((inner.args, inner.kwargs), copies.__getitem__)
                copies[inner] = build.call(target, *args, **kwargs)
            elif inner.op == "output":
                result = inner.args[0][0] if isinstance(inner.args[0], (tuple, list)) else inner.args[0]
                return build.call(_aten.expand.default, copies[result], shape, name="attended_keys")
        raise AssertionError("a graph without an output")

    def _mask_in_order(self, mask: fx.Node, axis: int) -> fx.Node:
        shape = self.build.value(mask).shape
        if len(shape) < -axis or (isinstance(shape[axis], int) and shape[axis] == 1):
            return mask
        return self._in_order(mask, len(shape) + axis)


def _all_runs(site: Site) -> list[tuple[bool, Run]]:
    """All tokens as runs in their order, and whether each is video."""
    runs: list[tuple[bool, Run]] = []
    end: Any = sympy.Integer(0)
    for start, length in site.video_parts:
        if not same_length(sympy.sympify(start), end):
            runs.append((False, (end, start - end)))
        runs.append((True, (start, length)))
        end = sympy.sympify(start) + length
    total = sympy.sympify(site.num_tokens)
    if not same_length(total, end):
        runs.append((False, (end, total - end)))
    return [(is_video, (sympy.sympify(start), sympy.sympify(length))) for is_video, (start, length) in runs]


def _order(site: Site) -> list[int]:
    """For every run in its old place, which run of the new order it is."""
    runs = _all_runs(site)
    new = [index for wanted in (True, False) for index, (is_video, _) in enumerate(runs) if is_video == wanted]
    return [new.index(index) for index in range(len(runs))]


def _video_first(site: Site) -> list[Run]:
    if len(site.video_parts) < 2:
        return [(sympy.Integer(0), sympy.sympify(site.num_tokens))]
    runs = _all_runs(site)
    return [run for wanted in (True, False) for is_video, run in runs if is_video == wanted]
