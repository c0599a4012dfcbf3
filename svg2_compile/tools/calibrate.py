"""Measures on a device what the cost model multiplies by: a profile of the device at hand instead of one of its kind.

Every figure comes from the operators that a rewritten attention calls, on one size that is large enough for them to be
at their rate; what a call and a head cost besides, from two small sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.autotune.timing import median_ms
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.kernels.first_order import FAR_MEMBERS, estimates_for_terms
from svg2_compile.passes.cost_model import CostInputs, dense_seconds, sparse_seconds
from svg2_compile.passes.device_profile import DeviceProfile

__all__ = ["CalibrationSize", "measure_profile"]

DENSITY = 0.10
SMALL_TOKENS, FEW_HEADS, MORE_HEADS = 1024, 1, 4


@dataclass(frozen=True)
class CalibrationSize:
    """Tokens and heads at which rates are measured, of a head dimension and a dtype."""

    num_tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> CalibrationSize:
        """Large enough for a device to be at its rates, and a matter of seconds."""
        if device.type == "cuda":
            return cls(32768, 8, 128, torch.bfloat16)
        return cls(8192, 2, 64, torch.float32)

    def cost(self) -> CostInputs:
        """What the cost model is told of this attention."""
        return CostInputs(
            video=self.num_tokens,
            context=0,
            groups=self.num_heads,
            head_dim=self.head_dim,
            num_q_clusters=QUERY_CLUSTERS.count(self.num_tokens),
            num_k_clusters=KEY_CLUSTERS.count(self.num_tokens),
            iters=1,
            density=DENSITY,
            bytes_per_element=self.dtype.itemsize,
            compensation=True,
            error_routing=True,
            first_order=True,
        )


def measure_profile(device: torch.device, size: CalibrationSize | None = None) -> dict[str, float]:
    """The figures of a DeviceProfile, measured on ``device`` now; by default at ``CalibrationSize.of(device)``."""
    size = size or CalibrationSize.of(device)
    cost, run = size.cost(), _Stages(size, device)
    dense, kmeans, permute, attend = (
        median_ms(stage, device) / 1e3 for stage in (run.dense, run.kmeans, run.permute, run.attend)
    )
    # Each figure is set so that the cost model gives what was measured.
    one = DeviceProfile("measured", 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, "calibration")
    only = {"sparse_flops": attend, "kmeans_flops": kmeans, "bandwidth": permute}
    endless = one.having(dict.fromkeys(only, float("inf")))
    figures = {name: float(sparse_seconds(cost, endless.having({name: 1.0}))) / s for name, s in only.items()}
    figures["dense_flops"] = float(dense_seconds(cost, one)) / dense
    return {**figures, "cluster_overhead": 0.0, **_overheads(size, device, one.having(figures))}


def _overheads(size: CalibrationSize, device: torch.device, rates: DeviceProfile) -> dict[str, float]:
    """Seconds of a call and of a head beyond what the rates explain, from small attentions of few and more heads."""
    beyond = {}
    for heads in (FEW_HEADS, MORE_HEADS):
        small = replace(size, num_tokens=min(SMALL_TOKENS, size.num_tokens), num_heads=heads)
        run = _Stages(small, device)
        beyond[heads] = median_ms(run.everything, device) / 1e3 - float(sparse_seconds(small.cost(), rates))
    head = max(0.0, (beyond[MORE_HEADS] - beyond[FEW_HEADS]) / (MORE_HEADS - FEW_HEADS))
    return {"head_overhead": head, "call_overhead": max(0.0, beyond[FEW_HEADS] - FEW_HEADS * head)}


class _Stages:
    """One rewritten attention over random tokens, stage by stage as the cost model parts it."""

    def __init__(self, size: CalibrationSize, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, size.num_heads, size.num_tokens, size.head_dim)
        self.query, self.key, self.value = (
            torch.randn(shape, generator=generator, device=device).to(size.dtype) for _ in range(3)
        )
        self.scale = size.head_dim**-0.5
        self.warm = torch.ones((), dtype=torch.bool, device=device)
        self.density = torch.full((), DENSITY, device=device)
        cost = size.cost()
        self.q_start = self._spread(self.query, cost.num_q_clusters)
        self.k_start = self._spread(self.key, cost.num_k_clusters)
        self.everything()

    @staticmethod
    def _spread(tokens: Tensor, count: int) -> Tensor:
        """Evenly spread tokens as centroids, float32 [1, H, count, D]."""
        return tokens[:, :, torch.linspace(0, tokens.shape[2] - 1, count).long()].to(torch.float32)

    def everything(self) -> None:
        self.kmeans()
        self.permute()
        self.attend()

    def dense(self) -> None:
        torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value)

    def kmeans(self) -> None:
        self.q_labels, self.q_means, self.q_sizes = ops.kmeans(self.query, self.q_start, self.warm, 1)
        self.k_labels, self.k_means, _ = ops.kmeans(self.key, self.k_start, self.warm, 1)

    def permute(self) -> None:
        """Orders, and keys and values in them; queries and outputs move within attention."""
        num_tokens = self.query.shape[2]
        self.q_order, self.q_offsets = ops.cluster_order(self.q_labels, self.q_means.shape[2], 0, num_tokens)
        self.k_order, self.k_offsets = ops.cluster_order(self.k_labels, self.k_means.shape[2], 0, num_tokens)
        self.k_permuted = ops.permute_tokens(self.key, self.k_order)
        self.v_permuted = ops.permute_tokens(self.value, self.k_order)

    def attend(self) -> None:
        """Means, estimates, selection, terms and attention: what the cost model counts in pairs."""
        means = (self.q_means, self.k_means, ops.cluster_means(self.v_permuted, self.k_offsets))
        keys = (self.k_permuted, self.v_permuted, self.k_offsets)
        log_mass, log_error, *of_all = estimates_for_terms(self.query.device)(*keys, *means, self.scale)
        queries = (self.query, self.q_order, self.q_offsets, self.q_means)
        variances, far_members = ops.cluster_variances(*queries), ops.farthest_members(*queries, FAR_MEMBERS)
        sizes = (self.q_sizes, self.k_offsets, self.scale, self.density)
        block_map = ops.select_blocks_of_layer(log_mass, log_error, variances, self.k_means, *sizes, far_members)
        terms = ops.first_order_terms(*keys, *means, log_mass, block_map, self.scale, *of_all)
        tokens = (self.query, self.k_permuted, self.v_permuted, self.q_offsets, self.k_offsets, block_map, self.scale)
        ops.first_order_attention(*tokens, *means, log_mass, *terms, self.q_order, None)
