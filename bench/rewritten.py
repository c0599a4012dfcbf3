"""The attention that the compiler puts in place of a dense one, stage by stage on one device, and its exact rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shape import Shape
from svg2_compile.kernels import ops
from svg2_compile.kernels.first_order import FAR_MEMBERS, estimates_for_terms
from svg2_compile.settings.config import Svg2Config

__all__ = ["Inputs", "Rewritten", "Settings", "make_inputs"]

WARM_ITERS = Svg2Config().step_iters  # k-means iterations of every denoising step but the first
FIRST_ITERS = Svg2Config().init_iters


@dataclass(frozen=True)
class Settings:
    """What one rewritten attention computes.

    density: fixed budget; None uses top_p. compensation, by_error: of EAR. first_order: this package's own default,
    with one density for all heads. gather_keys: the attention kernel reads keys and values in token order through
    k_order, instead of permuted copies.
    """

    density: float | None = None
    top_p: float = 0.9
    compensation: bool = False
    by_error: bool = False
    first_order: bool = False
    gather_keys: bool = False


class Inputs(NamedTuple):
    """Tokens [1, H, N, D] and the centroids that the step before left, float32 [1, H, C, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_centroids: Tensor
    k_centroids: Tensor


def make_inputs(shape: Shape, tokens: tuple[Tensor, Tensor, Tensor]) -> Inputs:
    """Cluster the tokens once, as the first step of a video does."""
    query, key, value = tokens

    def first_step(x: Tensor, count: int) -> Tensor:
        unused = x.new_zeros(1, shape.num_heads, count, shape.head_dim, dtype=torch.float32)
        return ops.kmeans(x.narrow(2, 0, shape.video_tokens), unused, _flag(x, False), FIRST_ITERS)[1]

    return Inputs(*(query, key, value), first_step(query, shape.num_q_clusters), first_step(key, shape.num_k_clusters))


def _flag(x: Tensor, value: bool) -> Tensor:
    return torch.full((), value, dtype=torch.bool, device=x.device)


class Rewritten:
    """One call of the rewritten attention over ``inputs``; ``run`` does all stages and returns the result."""

    def __init__(self, shape: Shape, inputs: Inputs, settings: Settings) -> None:
        self.shape, self.inputs, self.settings = shape, inputs, settings
        self.warm = _flag(inputs.query, True)
        self.v_means: Tensor | None = None
        self.run()

    @property
    def stages(self) -> dict[str, Callable[[], None]]:
        """The stages in order; each reads what those before it left."""
        stages = {"k-means": self.cluster, "order": self.order}
        if not self.settings.gather_keys:
            stages["permute"] = self.permute
        if self.settings.compensation or self.settings.first_order:
            stages["means"] = self.means
        if self.settings.first_order:
            stages["estimate"] = self.estimate
        stages["select"] = self.select
        if self.settings.first_order:
            stages["terms"] = self.first_order_terms
        return {**stages, "attend": self.attend}

    def run(self) -> Tensor:
        """All stages. Returns out [1, H, N, D] in token order."""
        for stage in self.stages.values():
            stage()
        return self.out

    def cluster(self) -> None:
        video = self.shape.video_tokens
        query, key, _, q_centroids, k_centroids = self.inputs
        query, key = query.narrow(2, 0, video), key.narrow(2, 0, video)
        self.q_labels, self.q_means, self.q_sizes = ops.kmeans(query, q_centroids, self.warm, WARM_ITERS)
        self.k_labels, self.k_means, self.k_sizes = ops.kmeans(key, k_centroids, self.warm, WARM_ITERS)

    def order(self) -> None:
        num_tokens = self.shape.num_tokens
        self.q_order, self.q_offsets = ops.cluster_order(self.q_labels, self.q_means.shape[2], 0, num_tokens)
        self.k_order, self.k_offsets = ops.cluster_order(self.k_labels, self.k_means.shape[2], 0, num_tokens)

    def permute(self) -> None:
        self.k_permuted = ops.permute_tokens(self.inputs.key, self.k_order)
        self.v_permuted = ops.permute_tokens(self.inputs.value, self.k_order)

    def means(self) -> None:
        self.v_means = ops.cluster_means(self.v_permuted, self.k_offsets)

    @property
    def clustered(self) -> tuple[Tensor, ...]:
        """What estimates and terms are sums over."""
        assert self.v_means is not None
        return self.k_permuted, self.v_permuted, self.k_offsets, self.q_means, self.k_means, self.v_means

    def estimate(self) -> None:
        estimates = estimates_for_terms(self.inputs.key.device)
        self.log_mass, self.log_error, *self.residual_of_all = estimates(*self.clustered, self.shape.scale)

    def first_order_terms(self) -> None:
        known = (self.log_mass, self.block_map, self.shape.scale, *self.residual_of_all)
        self.residual, self.slope = ops.first_order_terms(*self.clustered, *known)

    def _select_of_layer(self) -> None:
        assert self.settings.density is not None, "heads share a density"
        queries = (self.inputs.query, self.q_order, self.q_offsets, self.q_means)
        estimates = (self.log_mass, self.log_error, ops.cluster_variances(*queries))
        density = torch.full((), self.settings.density, device=self.q_means.device)
        sizes = (self.q_sizes, self.k_offsets, self.shape.scale, density)
        far_members = ops.farthest_members(*queries, FAR_MEMBERS)
        self.block_map = ops.select_blocks_of_layer(*estimates, self.k_means, *sizes, far_members)

    def select(self) -> None:
        if self.settings.first_order:
            self._select_of_layer()
            return
        limits = (self.shape.scale, self.settings.top_p, 0.0, self.settings.density)
        if not self.settings.by_error:
            self.block_map = ops.select_blocks(self.q_means, self.k_means, self.q_sizes, self.k_sizes, *limits)
            return
        assert self.v_means is not None, "routing by error needs compensation"
        tokens = (self.k_permuted, self.v_permuted, self.k_offsets)
        self.block_map = ops.select_blocks_by_error(
            *tokens, self.q_means, self.k_means, self.v_means, self.q_sizes, *limits
        )

    def attention(self) -> tuple[Tensor, Tensor]:
        """The attention kernel alone: out [1, H, N, D] and lse float32 [1, H, N], both in token order."""
        if self.settings.gather_keys:
            key, value, k_order = self.inputs.key, self.inputs.value, self.k_order
        else:
            key, value, k_order = self.k_permuted, self.v_permuted, None
        blocks = (self.q_offsets, self.k_offsets, self.block_map)
        if self.settings.first_order:
            terms = (self.log_mass, self.residual, self.slope)
            tokens = (self.inputs.query, key, value)
            of_clusters = (self.shape.scale, *self.clustered[3:], *terms, self.q_order, k_order)
            return ops.first_order_attention(*tokens, *blocks, *of_clusters)
        means = (None, None) if self.v_means is None else (self.k_means, self.v_means)
        return ops.block_sparse_attention(
            self.inputs.query, key, value, *blocks, self.shape.scale, *means, self.q_order, k_order
        )

    def attend(self) -> None:
        self.out, _ = self.attention()

    def densities(self) -> Tensor:
        """Selected pairs over all pairs, float32 [H]."""
        return ops.block_density(self.q_offsets, self.k_offsets, self.block_map)[0]

    def keys_read(self) -> int:
        """Keys that all query tiles of 128 rows together gather: what the attention kernel moves from the cache."""
        tiles = (self.q_offsets.diff(dim=-1) + 127) // 128
        keys = (self.block_map.double() @ self.k_offsets.diff(dim=-1).double().unsqueeze(-1)).squeeze(-1)
        return int((tiles * keys).sum())

    def exact_rows(self, tokens: Tensor) -> Tensor:
        """What the query ``tokens`` of every head should give, in float64: [H, len(tokens), D]."""
        return torch.stack([self._exact_rows(head, tokens) for head in range(self.shape.num_heads)])

    def _exact_rows(self, head: int, tokens: Tensor) -> Tensor:
        query, key, value = (x[0, head].double() for x in self.inputs[:3])
        selected = self.block_map[0, head][_block_of_token(self.q_order[0, head], self.q_offsets[0, head])[tokens]]
        scores = self.shape.scale * (query[tokens] @ key.T)
        k_block = _block_of_token(self.k_order[0, head], self.k_offsets[0, head])
        scores.masked_fill_(~selected[:, k_block], -math.inf)
        if self.v_means is None:
            return torch.softmax(scores, dim=-1) @ value
        own = _block_of_token(self.q_order[0, head], self.q_offsets[0, head])[tokens]
        bias = self.k_offsets[0, head].diff()[:-2].double().log()
        if self.settings.first_order:
            # Context queries skip nothing.
            own = own.clamp(max=self.q_means.shape[2] - 1)
            at_centroid = self.shape.scale * (self.q_means[0, head].double() @ self.k_means[0, head].double().T)
            bias = (self.log_mass[0, head, :, :-2].double() - at_centroid)[own]
        skipped = self.shape.scale * (query[tokens] @ self.k_means[0, head].double().T) + bias
        scores = torch.cat([scores, skipped.masked_fill(selected[:, :-2], -math.inf)], dim=1)
        weights, value = torch.softmax(scores, dim=-1), torch.cat([value, self.v_means[0, head].double()])
        if not self.settings.first_order:
            return weights @ value
        away = query[tokens] - self.q_means[0, head].double()[own]
        added = self.residual[0, head].double()[own] + away @ self.slope[0, head].double()
        return weights @ value + weights[:, -skipped.shape[1] :].sum(dim=1, keepdim=True) * added


def _block_of_token(order: Tensor, offsets: Tensor) -> Tensor:
    """Block of every token of one head, from its order and offsets: int64 [N]."""
    positions = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    block_of_position = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)
    return torch.empty_like(block_of_position).scatter_(0, order.long(), block_of_position)
