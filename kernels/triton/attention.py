"""Block-sparse attention on the GPU: plans the lists of key ids, then runs the attention kernel pass by pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svg2_compile.kernels.triton.attend import attend
from svg2_compile.kernels.triton.launch import (
    device_of,
    num_processors,
    padded,
    require_head_dim,
    row_strides,
    rows_dense,
)
from svg2_compile.kernels.triton.plan import AttentionPlan, Blocks, label_keys, plan_rows, row_key_counts, write_lists
from svg2_compile.kernels.triton.primitives import LOG2_E
from svg2_compile.kernels.triton.workspace import Workspace, plan_workspace
from svg2_compile.kernels.tuning.lookup import tuned

__all__ = ["block_density", "block_sparse_attention", "first_order_attention"]


@dataclass(frozen=True)
class Means:
    """Skipped clusters as the kernel reads them: keys [B, Hkv, Ck, BLOCK_D] and values [B, Hkv, Ck, BLOCK_DV] in the
    tokens' dtype, and biases in powers of two, float32: log2 of the sizes [B, Hkv, Ck]; to first order
    [B, Hq, Cq, Ck], with shift float32 [B, Hq, Cq, BLOCK_DV] and slope [B, Hkv, BLOCK_D, BLOCK_DV] (tokens' dtype)."""

    key: Tensor
    value: Tensor
    biases: Tensor
    shift: Tensor | None = None
    slope: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.key, self.value, self.biases, self.shift, self.slope)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class AttentionWork:
    """One call of the op, all on the device. Tokens [B, H, N, D] with dense rows; orders int32 [B, H, N] or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    q_order: Tensor | None
    k_order: Tensor | None
    blocks: Blocks
    means: Means | None
    scale: float

    @property
    def compensates(self) -> bool:
        return self.means is not None

    def space(self, block_m: int, limit_bytes: int) -> Workspace:
        """How the call's lists fit into ``limit_bytes``."""
        batch, q_heads, num_queries, _ = self.query.shape
        return plan_workspace(
            num_groups=batch * q_heads,
            num_kv_groups=batch * self.key.shape[1],
            num_queries=num_queries,
            num_keys=self.key.shape[2],
            num_q_blocks=self.blocks.block_map.shape[2],
            num_k_blocks=self.blocks.block_map.shape[3],
            block_m=block_m,
            compensate=self.compensates,
            limit_bytes=limit_bytes,
            mean_bytes=self.means.num_bytes if self.means else 0,
        )

    def run(self, limit_bytes: int) -> None:
        """Chunk by chunk of groups, pass by pass: write the lists, attend to them."""
        batch, q_heads, _, width = self.query.shape
        num_keys = self.key.shape[2]
        config = tuned("attention", self.query.device, self.query.dtype, max(width, self.value.shape[3]), num_keys)
        space = self.space(config["BLOCK_M"], limit_bytes)
        block_of_key = label_keys(self.blocks.k_offsets, num_keys)
        pool = block_of_key.new_empty(space.pool_ids)
        for first in range(0, batch * q_heads, space.groups_per_chunk):
            groups = slice(first, min(first + space.groups_per_chunk, batch * q_heads))
            plan = plan_rows(self.blocks, groups, self.query.shape[2], config["BLOCK_M"], self.compensates, space)
            counters = pool.new_zeros(space.passes)
            for this_pass in range(space.passes):
                place = (this_pass, space.capacity, groups.start)
                write_lists(plan, self.blocks, place, block_of_key, self.k_order, pool, self.compensates)
                self._attend(plan, place, pool, counters, config)

    def _attend(
        self,
        plan: AttentionPlan,
        place: tuple[int, int, int],
        pool: Tensor,
        counters: Tensor,
        config: Mapping[str, int],
    ) -> None:
        """Attend to the lists of one pass; place: the pass, its capacity, the first group of the chunk."""
        num_rows, num_k_blocks = self.blocks.block_map.shape[2:]
        # A scale of 0 would turn masked scores into 0 * -inf; queries of 0 do the same without.
        to_log2 = abs(self.scale) * LOG2_E.value if self.scale != 0 else 1.0
        sign = math.copysign(1.0, self.scale) if self.scale != 0 else 0.0
        unused = plan.key_counts
        means: tuple[Tensor, ...] = (self.key, self.value, unused, unused, self.key)
        if self.means is not None:
            means = (self.means.key, self.means.value, self.means.biases, *means[3:])
        is_first_order = self.means is not None and self.means.shift is not None
        if self.means is not None and self.means.shift is not None and self.means.slope is not None:
            means = (*means[:3], self.means.shift, self.means.slope)
        options = {name: value for name, value in config.items() if name != "PROGRAMS_PER_SM"}
        width, value_width = self.query.shape[3], self.value.shape[3]
        attend[(config["PROGRAMS_PER_SM"] * num_processors(self.query.device),)](
            *(self.query, self.key, self.value, *means, self.out, self.lse),
            *(unused if self.q_order is None else self.q_order, self.blocks.q_offsets),
            *(
                plan.rows,
                plan.key_counts,
                plan.skipped_counts,
                plan.places,
                plan.tile_starts,
                plan.tile_slots,
                plan.pass_slots,
            ),
            *(pool, counters, place[0], place[1], to_log2, sign, place[2], self.query.shape[2], *self.blocks.heads),
            *(num_rows, num_k_blocks, *row_strides(self.query), *row_strides(self.key), *row_strides(self.value)),
            *row_strides(self.out),
            **{"WIDTH": width, "BLOCK_D": padded(width), "VALUE_WIDTH": value_width, "BLOCK_DV": padded(value_width)},
            **{"MEANS_N": max(16, config["BLOCK_N"] // 2), "HAS_ORDER": self.q_order is not None},
            **{
                "COMPENSATE": self.compensates,
                "FIRST_ORDER": is_first_order,
                "WIDE": max(_extent(self.key), _extent(self.value)) >= 1 << 31,
            },
            **options,
        )


def _extent(tokens: Tensor) -> int:
    """Offset just behind the last row of a head, in elements."""
    return tokens.shape[2] * tokens.stride(2) + tokens.shape[3]


def _mean_rows(means: Tensor, dtype: torch.dtype) -> Tensor:
    missing = padded(means.shape[-1]) - means.shape[-1]
    return torch.nn.functional.pad(means.to(dtype), (0, missing)).contiguous()


def _means(key: Tensor, value: Tensor, k_offsets: Tensor, k_centroids: Tensor, v_centroids: Tensor) -> Means:
    sizes = k_offsets.diff(dim=-1).narrow(-1, 0, k_centroids.shape[2])
    log_sizes = sizes.to(torch.float32).log2().contiguous()
    return Means(_mean_rows(k_centroids, key.dtype), _mean_rows(v_centroids, value.dtype), log_sizes)


def _first_order_means(
    key: Tensor,
    centroids: tuple[Tensor, Tensor, Tensor],
    log_mass: Tensor,
    residual: Tensor,
    slope: Tensor,
    scale: float,
) -> Means:
    """Skipped clusters to first order. What depends on q - q_i is split into a part of q and one of q_i; both with the
    rounded means and slope that the kernel multiplies q with, so that rounding cancels at q = q_i."""
    q_centroids, k_centroids, v_centroids = centroids
    sharing = q_centroids.shape[1] // max(k_centroids.shape[1], 1)
    rounded = k_centroids.to(key.dtype).to(torch.float32).repeat_interleave(sharing, dim=1)
    logits = scale * (q_centroids @ rounded.transpose(-1, -2))
    biases = (LOG2_E.value * (log_mass.narrow(3, 0, k_centroids.shape[2]) - logits)).contiguous()
    per_head = slope.to(key.dtype).to(torch.float32).repeat_interleave(sharing, dim=1)
    width, value_width = slope.shape[2:]
    missing = padded(value_width) - value_width
    shift = torch.nn.functional.pad(residual - q_centroids @ per_head, (0, missing)).contiguous()
    matrix = torch.nn.functional.pad(slope.to(key.dtype), (0, missing, 0, padded(width) - width)).contiguous()
    return Means(_mean_rows(k_centroids, key.dtype), _mean_rows(v_centroids, key.dtype), biases, shift, matrix)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    k_centroids: Tensor | None = None,
    v_centroids: Tensor | None = None,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    workspace_mb: int = 256,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its selected key blocks; see ``ops.block_sparse_attention``."""
    means = None
    if k_centroids is not None and v_centroids is not None:
        with device_of(query):
            means = _means(key, value, k_offsets, k_centroids, v_centroids)
    tokens = (query, key, value)
    return _run(
        "block_sparse_attention", tokens, q_offsets, k_offsets, block_map, scale, means, q_order, k_order, workspace_mb
    )


def first_order_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    residual: Tensor,
    slope: Tensor,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    workspace_mb: int = 256,
) -> tuple[Tensor, Tensor]:
    """Selected keys exactly, skipped clusters to first order; see ``ops.first_order_attention``."""
    with device_of(query):
        means = _first_order_means(key, (q_centroids, k_centroids, v_centroids), log_mass, residual, slope, scale)
    tokens = (query, key, value)
    return _run(
        "first_order_attention", tokens, q_offsets, k_offsets, block_map, scale, means, q_order, k_order, workspace_mb
    )


def _run(
    op: str,
    tokens: tuple[Tensor, Tensor, Tensor],
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    means: Means | None,
    q_order: Tensor | None,
    k_order: Tensor | None,
    workspace_mb: int,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] and lse float32 [B, Hq, Nq] of query, key and value, as the op says."""
    query, key, value = tokens
    batch, q_heads, num_queries, width = query.shape
    require_head_dim(op, width, value.shape[3])
    if q_order is None:
        out = query.new_empty(batch, q_heads, num_queries, value.shape[3])
    else:
        out = query.new_empty(batch, num_queries, q_heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty((batch, q_heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.fill_(float("-inf"))
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    query, key, value = rows_dense(query), rows_dense(key), rows_dense(value)
    blocks = Blocks(q_offsets.contiguous(), k_offsets.contiguous(), block_map.contiguous().view(torch.int8))
    q_order, k_order = (None if order is None else order.contiguous() for order in (q_order, k_order))
    with device_of(query):
        work = AttentionWork(query, key, value, out, lse, q_order, k_order, blocks, means, scale)
        work.run(workspace_mb << 20)
    return out, lse


def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected pairs over all pairs; see ``ops.block_density``."""
    if block_map.numel() == 0:
        return q_offsets.new_zeros(q_offsets.shape[:2], dtype=torch.float32)
    blocks = Blocks(q_offsets.contiguous(), k_offsets.contiguous(), block_map.contiguous().view(torch.int8))
    with device_of(block_map):
        keys = row_key_counts(blocks, slice(0, block_map.shape[0] * block_map.shape[1])).view(block_map.shape[:3])
    q_sizes = q_offsets.diff(dim=-1).double()
    num_keys = k_offsets.select(-1, -1).repeat_interleave(block_map.shape[1] // k_offsets.shape[1], dim=1)
    all_pairs = q_sizes.sum(dim=-1) * num_keys
    return ((q_sizes * keys).sum(dim=-1) / all_pairs.clamp(min=1)).to(torch.float32)
