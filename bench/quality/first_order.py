"""First-order compensation on one attention: its parts, other slopes, and inputs of other sizes and widths.

    python -m bench.quality.first_order --sizes          clustered inputs, 1,024 to 16,384 tokens, head_dim 64 and 128
    python -m bench.quality.first_order --prompts 0 3    attentions of the trained model, layer by layer

JSON in bench/results/quality_first_order_sizes.json and quality_first_order_layers.json. What is shown is the output
error ||out - dense|| / ||dense|| at equal density, beside that of "centroid" compensation with a budget for each row.
Before anything is measured, everything selected must equal dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.clustered_inputs import clustered_inputs
from bench.common import require_close, write_results
from bench.minidit.sample import PROMPTS
from bench.quality.capture import Attention, watch_attention
from bench.quality.clusters import Budget, Clustering, SparseAttention, cluster
from bench.quality.measure import average, relative_error
from bench.quality.parts import Parts, parts, slopes_of_clusters
from bench.quality.results import FIRST_ORDER_LAYERS, FIRST_ORDER_SIZES, NO_MEMBERS
from bench.shape import default_shape
from svg2_compile.kernels import ops
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.kernels.first_order import FAR_MEMBERS
from svg2_compile.minidit.model import VideoSize, load_model

__all__ = ["FirstOrderAttention", "errors"]

DENSITIES = (0.10, 0.15, 0.25)
ITERS = 10
STEPS = (4, 9, 14)
DRAWN: dict[str, Any] = {"step": 9, "layer": 7, "density": 0.10}
"""The attention whose queries are moved away from their centroids; of the first prompt."""
DISTANCES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_MEMBERS = 16
TOLERANCE = 2e-5
BEFORE = "centroid, row"
NO_SLOPE = Parts(mass=True, residual=True, slope="none")


class FirstOrderAttention(SparseAttention):
    """One attention over one clustering with all that first-order compensation needs."""

    def __init__(self, attention: Attention, clustering: Clustering) -> None:
        super().__init__(attention, clustering)
        query, key = clustering.query, clustering.key
        self.means = (query.centroids, key.centroids, self.v_centroids)
        self.tokens = (self.key, self.value, key.offsets, *self.means)
        self.log_mass, self.log_error = ops.block_estimates(*self.tokens, attention.scale)
        queries = (attention.query, query.order, query.offsets, query.centroids)
        self.variances = ops.cluster_variances(*queries)
        self.far_members = ops.farthest_members(*queries, MOST_MEMBERS)

    def select_of_layer(self, density: float, variances: bool = True, members: int = FAR_MEMBERS) -> Tensor:
        """One budget for all heads; without variances and members by the error at the centroids alone."""
        key = self.clustering.key
        estimates = (self.log_mass, self.log_error, self.variances if variances else torch.zeros_like(self.variances))
        sizes = (self.clustering.query.sizes, key.offsets, self.attention.scale, torch.tensor(density))
        far_members = self.far_members[..., :members, :] if members > 0 else None
        return ops.select_blocks_of_layer(*estimates, key.centroids, *sizes, far_members)

    def attend_to_first_order(self, block_map: Tensor, left: Parts | None = None, terms: Any = None) -> Tensor:
        """The output [1, H, N, D] in token order; ``left``: with these parts only. terms: other (residual, slope)."""
        if left is not None:
            with parts(left):
                log_mass, _ = ops.block_estimates(*self.tokens, self.attention.scale)
                terms = ops.first_order_terms(*self.tokens, log_mass, block_map, self.attention.scale)
        else:
            log_mass = self.log_mass
            terms = terms or ops.first_order_terms(*self.tokens, log_mass, block_map, self.attention.scale)
        out, _ = self._attend(block_map, log_mass, *terms)
        return out

    def _attend(self, block_map: Tensor, log_mass: Tensor, residual: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.clustering.query, self.clustering.key
        blocks = (query.offsets, key.offsets, block_map, self.attention.scale)
        tokens = (self.attention.query, self.key, self.value)
        result: tuple[Tensor, Tensor] = ops.first_order_attention(
            *tokens, *blocks, *self.means, log_mass, residual, slope, query.order
        )
        return result

    def attend_with_slope_by_mass(self, block_map: Tensor) -> Tensor:
        """One slope per head whose clusters count by the attention on them that is skipped, not by their size."""
        residual, slope = ops.first_order_terms(*self.tokens, self.log_mass, block_map, self.attention.scale)
        for head in range(slope.shape[1]):
            share, slopes = self._skipped_shares(block_map, head), self._slopes(head)
            weights = (self.clustering.query.sizes[0, head].float() @ share).clamp(min=1e-30)
            slope[0, head] = torch.einsum("j,jde->de", weights / weights.sum(), slopes)
        return self.attend_to_first_order(block_map, terms=(residual, slope))

    def attend_with_slope_per_cluster(self, block_map: Tensor) -> Tensor:
        """Part J0: a slope per query cluster, of the clusters that it skips, by their mass."""
        residual, slope = ops.first_order_terms(*self.tokens, self.log_mass, block_map, self.attention.scale)
        out, lse = self._attend(block_map, self.log_mass, residual, torch.zeros_like(slope))
        _, selected = self._attend_to_selected(block_map)
        share = 1 - torch.exp(selected - lse)
        query = self.clustering.query
        for head in range(slope.shape[1]):
            weights = self._skipped_shares(block_map, head)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
            slopes = torch.einsum("ij,jde->ide", weights, self._slopes(head))
            label = query.labels[0, head].long()
            away = self.attention.query[0, head] - query.centroids[0, head][label]
            for own in range(slopes.shape[0]):
                rows = (label == own).nonzero().squeeze(1)
                out[0, head, rows] += share[0, head, rows, None] * (away[rows] @ slopes[own])
        return out

    def _attend_to_selected(self, block_map: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.clustering.query, self.clustering.key
        blocks = (query.offsets, key.offsets, block_map, self.attention.scale, None, None, query.order)
        result: tuple[Tensor, Tensor] = ops.block_sparse_attention(self.attention.query, self.key, self.value, *blocks)
        return result

    def _skipped_shares(self, block_map: Tensor, head: int) -> Tensor:
        """Of every query cluster's attention the part on each cluster that it skips, [Cq, Ck]."""
        log_mass = self.log_mass[0, head]
        share = torch.softmax(log_mass, dim=1)[:, :-2]
        return share.masked_fill(block_map[0, head, : share.shape[0], : share.shape[1]], 0.0)

    def _slopes(self, head: int) -> Tensor:
        means = (self.clustering.key.centroids[0, head], self.v_centroids[0, head])
        sizes = self.clustering.key.sizes[0, head]
        return slopes_of_clusters(self.key[0, head], self.value[0, head], sizes, *means, self.attention.scale)


def errors(attention: Attention, clustering: Clustering, densities: Sequence[float]) -> dict[str, list[float]]:
    """Output error of every combination at each density; and what density the first one really has. Compared are
    selections of equal density: that of the rows, whose budgets end with a whole block each."""
    sparse = FirstOrderAttention(attention, clustering)
    everything = sparse.attend_to_first_order(sparse.select_of_layer(1.0))
    require_close("everything selected", everything, attention.dense, TOLERANCE)
    curves: dict[str, list[float]] = {}
    for density in densities:
        rows = sparse.select(Budget(density), by_error=True)
        actual = sparse.density(rows)
        layer = sparse.select_of_layer(actual)
        curves.setdefault("density", []).append(actual)
        for name, out in _combinations(sparse, rows, layer, actual):
            curves.setdefault(name, []).append(relative_error(out, attention.dense))
    return curves


def _combinations(
    sparse: FirstOrderAttention, rows: Tensor, layer: Tensor, density: float
) -> Iterator[tuple[str, Tensor]]:
    """Outputs by the parts that made them, over a selection of rows and one of the layer, at the density of both."""
    first_order = sparse.attend_to_first_order
    yield BEFORE, sparse.attend(rows, compensation=True)
    yield "global slope", first_order(rows, Parts(mass=False, residual=False, slope="head"))
    yield "A + B", first_order(rows, NO_SLOPE)
    yield "A + B + J", first_order(rows)
    yield "P", sparse.attend(layer, compensation=True)
    yield "P + A", first_order(layer, Parts(mass=True, residual=False, slope="none"))
    yield "P + A + B", first_order(layer, NO_SLOPE)
    yield "P + A + B + J", first_order(layer)
    yield "P + A + B + J by mass", sparse.attend_with_slope_by_mass(layer)
    yield "P + A + B + J0", sparse.attend_with_slope_per_cluster(layer)
    yield NO_MEMBERS, first_order(sparse.select_of_layer(density, members=0))
    for count in (4, MOST_MEMBERS):
        yield f"P by {count} members + A + B + J", first_order(sparse.select_of_layer(density, members=count))
    yield "P by members alone + A + B + J", first_order(sparse.select_of_layer(density, variances=False))
    yield "P by centroids + A + B + J", first_order(sparse.select_of_layer(density, variances=False, members=0))


def errors_along_the_way(attention: Attention, clustering: Clustering) -> dict[str, list[float]]:
    """The output error of all queries if each is moved from its centroid (0) to where it is (1) and beyond, by what
    stands for skipped clusters. One selection for all."""
    sparse, query = FirstOrderAttention(attention, clustering), clustering.query
    layer = sparse.select_of_layer(DRAWN["density"])
    index = query.labels.long().unsqueeze(-1).expand_as(attention.query)
    centroids = query.centroids.gather(2, index)
    drawn: dict[str, list[float]] = {"distance": list(DISTANCES)}
    for distance in DISTANCES:
        moved = centroids + distance * (attention.query - centroids)
        sparse.attention = attention_of(moved, attention.key, attention.value)
        outputs = {
            "centroid": sparse.attend(layer, compensation=True),
            "A + B": sparse.attend_to_first_order(layer, NO_SLOPE),
            "A + B + J": sparse.attend_to_first_order(layer),
        }
        for name, out in outputs.items():
            drawn.setdefault(name, []).append(relative_error(out, sparse.attention.dense))
    return drawn


def attention_of(query: Tensor, key: Tensor, value: Tensor) -> Attention:
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return Attention(0, 0, query, key, value, dense)


def of_sizes() -> Iterator[dict[str, Any]]:
    """Clustered inputs of other lengths and widths."""
    for num_tokens in (1024, 4096, 16384):
        for head_dim in (64, 128):
            for spread in (1.2, 2.4):
                shape = default_shape("", 4, num_tokens, head_dim, spread, torch.float32)
                attention = attention_of(*(x.contiguous() for x in clustered_inputs(shape)))
                clustering = cluster(attention, (shape.num_q_clusters, shape.num_k_clusters), ITERS)
                curves = errors(attention, clustering, DENSITIES)
                yield {"num_tokens": num_tokens, "head_dim": head_dim, "spread": spread, "error": curves}


def of_layers(prompts: Sequence[int], size: VideoSize) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Attentions of the trained model at three steps: a row per layer, mean over prompts and steps; and the queries of
    one of them."""
    counts = QUERY_CLUSTERS.count(size.tokens), KEY_CLUSTERS.count(size.tokens)
    measured: dict[int, list[Any]] = {}
    drawn: dict[str, list[float]] = {}

    def measure(attention: Attention) -> None:
        clustering = cluster(attention, counts, ITERS)
        if not drawn and (attention.step, attention.layer) == (DRAWN["step"], DRAWN["layer"]):
            drawn.update(errors_along_the_way(attention, clustering))
        curves = errors(attention, clustering, DENSITIES)
        measured.setdefault(attention.layer, []).append(curves)
        print(
            attention.step, attention.layer, {name: round(values[0], 4) for name, values in curves.items()}, flush=True
        )

    for prompt in prompts:
        watch_attention(load_model(), PROMPTS[prompt], 100 + prompt, size, 20, 3.0, STEPS, measure)
    return [{"layer": layer, "error": average(curves)} for layer, curves in sorted(measured.items())], drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="clustered inputs of other sizes and widths")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="attentions of the trained model")
    arguments = parser.parse_args()
    about = {"densities": DENSITIES, "iterations": ITERS}
    if arguments.sizes:
        rows = []
        for row in of_sizes():
            rows.append(row)
            print(
                {key: row[key] for key in row if key != "error"},
                {k: round(v[0], 4) for k, v in row["error"].items()},
                flush=True,
            )
        print(write_results(FIRST_ORDER_SIZES, rows, **about))
    if arguments.prompts:
        size = VideoSize(16, 64, 64)
        rows, drawn = of_layers(arguments.prompts, size)
        about |= {
            "prompts": arguments.prompts,
            "steps": STEPS,
            "tokens": size.tokens,
            "drawn": {**DRAWN, "prompt": arguments.prompts[0]},
        }
        about |= {"queries": drawn}
        print(write_results(FIRST_ORDER_LAYERS, rows, **about))


if __name__ == "__main__":
    main()
