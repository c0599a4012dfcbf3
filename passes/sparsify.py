"""Rewrite chosen attentions into cluster, select, permute, attend.

Needs: sites from decide_sites on this very graph, fake metadata on its nodes.

Before (one self-attention over N video tokens):

    out = scaled_dot_product_attention(query, key, value)

After:

    q_labels, q_centroids, q_sizes = svg2.kmeans(query, cold_centroids, cold_flag, init_iters)
    k_labels, k_centroids, k_sizes = svg2.kmeans(key, cold_centroids, cold_flag, init_iters)
    q_order, q_offsets = svg2.cluster_order(q_labels, Cq, start, N)
    k_order, k_offsets = svg2.cluster_order(k_labels, Ck, start, N, valid)
    key, value = svg2.permute_tokens(key, k_order), svg2.permute_tokens(value, k_order)
    block_map = svg2.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, scale, top_p, min_k_ratio)
    out = svg2.block_sparse_attention(query, key, value, q_offsets, k_offsets, block_map, scale, q_order=q_order)

With compensation="first_order" and one budget for all heads, the last two lines are:

    v_centroids = svg2.cluster_means(value, k_offsets)
    q_variances = svg2.cluster_variances(query, q_order, q_offsets, q_centroids)
    far_members = svg2.farthest_members(query, q_order, q_offsets, q_centroids, 8)
    log_mass, log_error, residual_of_all = svg2.first_order_estimates(
        key, value, k_offsets, q_centroids, k_centroids, v_centroids, scale)
    block_map = svg2.select_blocks_of_layer(
        log_mass, log_error, q_variances, k_centroids, q_sizes, k_offsets, scale, budget, far_members)
    residual, slope = svg2.first_order_terms(
        key, value, k_offsets, q_centroids, k_centroids, v_centroids, log_mass, block_map, scale,
        residual_of_all)
    out = svg2.first_order_attention(
        query, key, value, q_offsets, k_offsets, block_map, scale,
        q_centroids, k_centroids, v_centroids, log_mass, residual, slope, q_order)

On a GPU the estimates are those of svg2.block_estimates, without residual_of_all, which spares nothing there.

Keys and values are permuted once, for all that reads them cluster by cluster. Queries are read, and rows of the result
written, where they lie: the kernel follows q_order, and neither takes a trip through memory of its own.

Guarantees: the replaced node has the shape, dtype and strides that it had; every other node is untouched. The graph
is complete as it stands, starting cold on every call: carrying centroids from step to step is hoist_centroids' work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.emit_padding import emit_valid, emit_zero_padding
from svg2_compile.passes.balance_heads import HeadOrder
from svg2_compile.passes.block_attention import BlockAttention, ClusteredTokens, Clustering, SparsityPolicy
from svg2_compile.passes.graph.builder import GraphBuilder
from svg2_compile.passes.graph.sizes import SizeEmitter
from svg2_compile.passes.sites import Site

__all__ = ["Clustering", "SparseSite", "SparsityPolicy", "sparsify"]

_svg2 = torch.ops.svg2


@dataclass(frozen=True)
class SparseSite:
    """One rewritten attention."""

    site: Site
    query: Clustering
    key: Clustering
    density: fx.Node | None
    budget: fx.Node | None  # float32 [], a constant: the density that the heads share, or what it follows from
    next_budget: fx.Node | None = None  # float32 [], where it follows the error
    errors: fx.Node | None = None  # float32 [B, H]: of every head
    error: fx.Node | None = None  # float32 []: of all heads together
    head_order: HeadOrder | None = None  # which heads are whose, where they are spread over ranks


def sparsify(
    gm: fx.GraphModule, sites: list[Site], policy: SparsityPolicy, orders: Mapping[int, HeadOrder] | None = None
) -> list[SparseSite]:
    """Rewrite ``sites`` of ``gm`` in place and return a record of each, in the order given.

    orders: of balance_heads, which are handed on with the records.
    """
    sizes = SizeEmitter(gm.graph)
    rewritten = [_SiteRewriter(gm.graph, site, policy, sizes).rewrite() for site in sites]
    rewritten = [replace(record, head_order=(orders or {}).get(record.site.index)) for record in rewritten]
    gm.graph.lint()
    gm.recompile()
    return rewritten


class _SiteRewriter:
    """Emits the subgraph of one site, one method for each stage of the algorithm."""

    def __init__(self, graph: fx.Graph, site: Site, policy: SparsityPolicy, sizes: SizeEmitter) -> None:
        self.site = site
        self.call = site.call
        self.policy = policy
        self.build = GraphBuilder(graph, anchor=site.call.node, prefix=f"svg2_{site.index}_")
        self.start = sizes.emit(site.video_start, before=site.call.node)
        self.video_tokens = sizes.emit(site.video_tokens, before=site.call.node)
        self.num_tokens = sizes.emit(site.num_tokens, before=site.call.node)
        self.num_q_clusters = sizes.emit(site.num_q_clusters, before=site.call.node)
        self.num_k_clusters = sizes.emit(site.num_k_clusters, before=site.call.node)
        self.scale = self.call.scale if self.call.scale is not None else 1.0 / math.sqrt(site.head_dim)

    def rewrite(self) -> SparseSite:
        build = self.build
        query, key, value = self._heads_first()
        valid = None
        if self.site.key_padding is not None:
            valid = emit_valid(build, self.site.key_padding, build.size(query, 0), self.num_tokens)

        query_side = self._cluster("query", query, self.num_q_clusters, None)
        key_side = self._cluster("key", key, self.num_k_clusters, valid)
        q_order, q_offsets = self._order("query", query_side.labels, self.num_q_clusters, None)
        k_order, k_offsets = self._order("key", key_side.labels, self.num_k_clusters, valid)

        k_permuted = build.call(_svg2.permute_tokens.default, key, k_order, name="key_permuted")
        v_permuted = build.call(_svg2.permute_tokens.default, value, k_order, name="value_permuted")
        tokens = ClusteredTokens(query, k_permuted, v_permuted, q_order, q_offsets, k_offsets)
        attention = BlockAttention(build, self.policy, self.scale, tokens, query_side, key_side)
        out = attention.emit()
        if self.site.key_padding is not None and self.site.key_padding.queries is not None:
            out = emit_zero_padding(build, self.site.key_padding.queries, out)
        density = None
        if self.policy.collect_stats:
            density = build.call(_svg2.block_density.default, q_offsets, k_offsets, attention.block_map, name="density")
            if self.site.dense_share is not None:
                ones = build.call(torch.ops.aten.ones_like.default, density)
                density = build.call(torch.ops.aten.lerp.Tensor, density, ones, self.site.dense_share)
        self._replace(out)
        guard = (attention.budget, attention.next_budget, attention.errors, attention.error)
        return SparseSite(self.site, query_side, key_side, density, *guard)

    def _heads_first(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query, key and value as [B, H, N, D], in the dtype that the dense attention computes in."""
        key = self.call.key
        if self.call.key_transposed:
            key = self.build.call(torch.ops.aten.transpose.int, key, -2, -1)
        query, key, value = (self._to_bhnd(node) for node in (self.call.query, key, self.call.value))
        # Under autocast the dense attention casts its inputs itself; its output tells to what.
        dtype = self.build.value(self.call.node).dtype
        query, key, value = (self._to_dtype(node, dtype) for node in (query, key, value))
        return query, key, value

    def _to_bhnd(self, node: fx.Node) -> fx.Node:
        if self.call.axes == "bnhd":
            return self.build.call(torch.ops.aten.transpose.int, node, 1, 2)
        if self.call.axes == "gnd":
            return self.build.call(torch.ops.aten.unflatten.int, node, 0, [-1, self.call.num_heads or 1])
        return node

    def _to_dtype(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if self.build.value(node).dtype == dtype:
            return node
        return self.build.call(torch.ops.aten.to.dtype, node, dtype)

    def _cluster(self, role: str, tokens: fx.Node, num_clusters: Any, valid: fx.Node | None) -> Clustering:
        """k-means over the video tokens of one side, started cold."""
        build = self.build
        video = build.narrow(tokens, 2, self.start, self.video_tokens)
        if valid is not None:
            valid = build.narrow(valid, 2, self.start, self.video_tokens)
        shape = [build.size(video, 0), build.size(video, 1), num_clusters, build.size(video, 3)]
        cold = build.call(
            torch.ops.aten.new_zeros.default, video, shape, dtype=torch.float32, name=f"{role}_cold_centroids"
        )
        flag = build.call(torch.ops.aten.new_zeros.default, video, [], dtype=torch.bool, name=f"{role}_cold_flag")
        extra = () if valid is None else (valid,)
        kmeans = build.call(
            _svg2.kmeans.default, video, cold, flag, self.policy.init_iters, *extra, name=f"{role}_kmeans"
        )
        outputs = build.unpack(kmeans, [f"{role}_labels", f"{role}_centroids", f"{role}_sizes"])
        return Clustering(role, kmeans, cold, flag, *outputs)

    def _order(self, role: str, labels: fx.Node, clusters: Any, valid: fx.Node | None) -> tuple[fx.Node, ...]:
        extra = () if valid is None else (valid,)
        ordered = self.build.call(
            _svg2.cluster_order.default, labels, clusters, self.start, self.num_tokens, *extra, name=f"{role}_ordering"
        )
        return self.build.unpack(ordered, [f"{role}_order", f"{role}_offsets"])

    def _replace(self, out: fx.Node) -> None:
        """Put ``out`` [B, H, N, D] in the place of the dense attention, in its layout and with its strides."""
        build = self.build
        if self.call.axes == "bnhd":
            out = build.call(torch.ops.aten.transpose.int, out, 1, 2)
        elif self.call.axes == "gnd":
            out = build.call(torch.ops.aten.flatten.using_ints, out, 0, 1)
        dense = build.value(self.call.node)
        if dense.stride() != build.value(out).stride():
            # Later nodes may view the output in a way that only the dense strides allow.
            out = build.call(torch.ops.aten.contiguous.default, out)
        self.call.node.replace_all_uses_with(out)
        build.graph.erase_node(self.call.node)
