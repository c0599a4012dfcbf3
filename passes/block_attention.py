"""Emits what follows clustering: which blocks are selected, and the attention over them.

``sparsify`` clusters and permutes; from there on everything is a choice of the policy, and this file has it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from svg2_compile.kernels import ops as _ops  # noqa: F401  (registers the svg2:: operators)
from svg2_compile.kernels.first_order import FAR_MEMBERS, starts_from_all_clusters
from svg2_compile.passes.error_guard import emit_density, emit_next_budget, emit_sampled_error
from svg2_compile.passes.graph.builder import GraphBuilder

__all__ = ["BlockAttention", "ClusteredTokens", "Clustering", "SparsityPolicy"]

_svg2 = torch.ops.svg2


@dataclass(frozen=True)
class SparsityPolicy:
    """What the rewritten attention computes; the numbers of algorithm.md, section "SVG2" and "EAR".

    top_p, min_k_ratio, density: block selection (density, if given, replaces top_p by a fixed budget).
    init_iters: k-means iterations of a cold start.
    compensation: "none"; "centroid" to let skipped clusters contribute through their centroids; "first_order" to make
        that exact at the centroids of the queries' clusters and right to first order next to them.
    routing: "score" (softmax mass) or "error" (expected error of compensation).
    budget: "row", every query cluster has the density; or "layer", all heads of an attention have it together.
    collect_stats: also emit the density of every site. measure_error: also emit its error on a few exact rows.
    target_error: that error, which the budget of the next step follows; None where the density is given.
    workspace_mb: MiB that the attention kernel may use for its lists of keys, on a GPU.
    """

    top_p: float
    min_k_ratio: float
    density: float | None
    init_iters: int
    compensation: str
    routing: str
    budget: str
    collect_stats: bool
    workspace_mb: int
    measure_error: bool = False
    target_error: float | None = None


@dataclass(frozen=True)
class Clustering:
    """The k-means of one side of a site, with the nodes that a cold start reads and hoist_centroids replaces."""

    role: str  # "query" or "key"
    kmeans: fx.Node
    cold_centroids: fx.Node
    cold_flag: fx.Node
    labels: fx.Node
    centroids: fx.Node
    sizes: fx.Node


class ClusteredTokens(NamedTuple):
    """query in token order with the order that would permute it; key and value permuted; all [B, H, N, D]."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    q_order: fx.Node
    q_offsets: fx.Node
    k_offsets: fx.Node


class BlockAttention:
    """Selection and attention of one site, emitted by ``emit``. Afterwards ``block_map`` is a node, and so are, where
    there is such a thing, ``budget`` (the heads share one), ``next_budget`` (it follows an error), ``errors`` of the
    heads and the ``error`` of all together."""

    def __init__(
        self,
        build: GraphBuilder,
        policy: SparsityPolicy,
        scale: float,
        tokens: ClusteredTokens,
        query: Clustering,
        key: Clustering,
    ) -> None:
        self.build, self.policy, self.scale = build, policy, scale
        self.tokens, self.query, self.key = tokens, query, key
        self.budget: fx.Node | None = None
        self.next_budget: fx.Node | None = None
        self.errors: fx.Node | None = None
        self.error: fx.Node | None = None
        self.means: tuple[fx.Node, ...] = ()
        self.estimates: dict[str, fx.Node] = {}

    def emit(self) -> fx.Node:
        """The output [B, H, N, D] in token order."""
        if self.policy.compensation != "none":
            arguments = (self.tokens.value, self.tokens.k_offsets)
            v_centroids = self.build.call(_svg2.cluster_means.default, *arguments, name="value_centroids")
            self.means = (self.query.centroids, self.key.centroids, v_centroids)
        if self.policy.compensation == "first_order" or self.policy.budget == "layer":
            self._estimate()
        self.block_map = self._select_of_layer() if self.policy.budget == "layer" else self._select_of_rows()
        attended = self._attend_to_first_order() if self.policy.compensation == "first_order" else self._attend()
        (out,) = self.build.unpack(attended, ["out"])
        if self.policy.measure_error or self.policy.target_error is not None:
            self._measure(out)
        return out

    def _measure(self, out: fx.Node) -> None:
        tokens, target = self.tokens, self.policy.target_error
        orders = (tokens.q_order, tokens.q_offsets, tokens.k_offsets)
        arguments = (tokens.query, tokens.key, tokens.value, out, *orders)
        self.errors, self.error = emit_sampled_error(self.build, *arguments, scale=self.scale)
        if target is not None and self.budget is not None:
            self.next_budget = emit_next_budget(self.build, self.budget, self.error, target)

    def _estimate(self) -> None:
        device = self.build.value(self.tokens.key).device
        whole = self.policy.compensation == "first_order" and starts_from_all_clusters(device)
        estimates = self.build.call(
            _svg2.first_order_estimates.default if whole else _svg2.block_estimates.default,
            *(self.tokens.key, self.tokens.value, self.tokens.k_offsets, *self.means, self.scale),
            name="estimates",
        )
        wanted = [
            "log_mass",
            "log_error" if self.policy.budget == "layer" else None,
            "residual_of_all" if whole else None,
        ]
        for index, name in enumerate(wanted):
            if name is not None:
                self.estimates[name] = self.build.call(operator.getitem, estimates, index, name=name)

    def _select_of_rows(self) -> fx.Node:
        limits = (self.scale, self.policy.top_p, self.policy.min_k_ratio, self.policy.density)
        if self.policy.routing == "error":
            tokens = (self.tokens.key, self.tokens.value, self.tokens.k_offsets)
            arguments = (*tokens, *self.means, self.query.sizes, *limits)
            return self.build.call(_svg2.select_blocks_by_error.default, *arguments, name="block_map")
        arguments = (self.query.centroids, self.key.centroids, self.query.sizes, self.key.sizes, *limits)
        return self.build.call(_svg2.select_blocks.default, *arguments, name="block_map")

    def _select_of_layer(self) -> fx.Node:
        build, query = self.build, self.query
        queries = (self.tokens.query, self.tokens.q_order, self.tokens.q_offsets, query.centroids)
        variances = build.call(_svg2.cluster_variances.default, *queries, name="query_variances")
        far_members = build.call(_svg2.farthest_members.default, *queries, FAR_MEMBERS, name="far_members")
        # A tensor, so that it may become an input that changes from step to step.
        self.budget = build.call(
            torch.ops.aten.new_full.default, query.centroids, [], self.policy.density, name="budget"
        )
        density = self.budget if self.policy.target_error is None else emit_density(build, self.budget)
        estimates = (self.estimates["log_mass"], self.estimates["log_error"])
        clusters = (*estimates, variances, self.key.centroids, query.sizes, self.tokens.k_offsets)
        return build.call(
            _svg2.select_blocks_of_layer.default,
            *(*clusters, self.scale, density, far_members),
            name="block_map",
        )

    def _attend(self) -> fx.Node:
        tokens, means = self.tokens, self.means[1:] or (None, None)
        blocks = (tokens.q_offsets, tokens.k_offsets, self.block_map)
        return self.build.call(
            _svg2.block_sparse_attention.default,
            *(tokens.query, tokens.key, tokens.value, *blocks, self.scale, *means),
            *(tokens.q_order, None, self.policy.workspace_mb),
            name="attended",
        )

    def _attend_to_first_order(self) -> fx.Node:
        tokens, log_mass = self.tokens, self.estimates["log_mass"]
        skipped = (*self.means, log_mass, self.block_map, self.scale)
        terms = self.build.call(
            _svg2.first_order_terms.default,
            *(tokens.key, tokens.value, tokens.k_offsets, *skipped, self.estimates.get("residual_of_all")),
            name="terms",
        )
        residual, slope = self.build.unpack(terms, ["residual", "slope"])
        blocks = (tokens.q_offsets, tokens.k_offsets, self.block_map)
        return self.build.call(
            _svg2.first_order_attention.default,
            *(tokens.query, tokens.key, tokens.value, *blocks, self.scale, *self.means, log_mass, residual, slope),
            *(tokens.q_order, None, self.policy.workspace_mb),
            name="attended",
        )
