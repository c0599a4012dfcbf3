"""Inputs and expectations that the kernel tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels import ops, reference

# What one rounding of the result costs, relative to its size, in each dtype.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Problem:
    """One clustered attention problem: everything that block_sparse_attention takes, permuted."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    block_map: Tensor
    scale: float
    k_centroids: Tensor
    v_centroids: Tensor

    def args(self, compensation: bool = False) -> tuple[Any, ...]:
        means = (self.k_centroids, self.v_centroids) if compensation else (None, None)
        return (
            self.query,
            self.key,
            self.value,
            self.q_offsets,
            self.k_offsets,
            self.block_map,
            self.scale,
            *means,
        )


def random_offsets(generator: torch.Generator, batch: int, heads: int, num_blocks: int, num_tokens: int) -> Tensor:
    """Boundaries of ``num_blocks`` blocks of uneven sizes, some of them empty: int32 [B, H, num_blocks + 1]."""
    weights = torch.rand(batch, heads, num_blocks, generator=generator).pow(3)
    weights *= torch.rand(batch, heads, num_blocks, generator=generator) > 0.2
    weights[..., 0] += 1e-3
    if num_tokens == 0:
        return torch.zeros(batch, heads, num_blocks + 1, dtype=torch.int32)
    flat = torch.multinomial(weights.flatten(0, 1), num_tokens, replacement=True, generator=generator)
    sizes = torch.nn.functional.one_hot(flat, num_blocks).sum(dim=1).view(batch, heads, num_blocks)
    return torch.nn.functional.pad(sizes.cumsum(dim=-1), (1, 0)).to(torch.int32)


def make_problem(
    *,
    seed: int = 0,
    batch: int = 1,
    q_heads: int = 2,
    kv_heads: int = 2,
    num_queries: int = 130,
    num_keys: int = 170,
    head_dim: int = 16,
    value_dim: int | None = None,
    num_q_clusters: int = 4,
    num_k_clusters: int = 9,
    dtype: torch.dtype = torch.float32,
    input_scale: float = 1.0,
    keep: float = 0.4,
) -> Problem:
    """Random tokens in random blocks with a random map (null column False, as select_blocks makes it)."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = value_dim or head_dim

    def tokens(heads: int, count: int, width: int) -> Tensor:
        return (input_scale * torch.randn(batch, heads, count, width, generator=generator)).to(dtype)

    query, key = tokens(q_heads, num_queries, head_dim), tokens(kv_heads, num_keys, head_dim)
    value = tokens(kv_heads, num_keys, value_dim)
    q_offsets = random_offsets(generator, batch, q_heads, num_q_clusters + 2, num_queries)
    k_offsets = random_offsets(generator, batch, kv_heads, num_k_clusters + 2, num_keys)
    block_map = torch.rand(batch, q_heads, num_q_clusters + 2, num_k_clusters + 2, generator=generator) < keep
    block_map[..., -1] = False
    k_centroids, v_centroids = reference.cluster_means(key, k_offsets), reference.cluster_means(value, k_offsets)
    scale = head_dim**-0.5
    return Problem(query, key, value, q_offsets, k_offsets, block_map, scale, k_centroids, v_centroids)


def assert_within_budget(actual: Tensor, exact: Tensor, eager: Tensor | None = None, roundings: float = 16.0) -> None:
    """|actual - exact| <= 2 * (error of eager low precision) + a budget of roundings of the largest result.

    ``exact`` is float64. Non-finite entries must agree in place and kind.
    """
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual.isnan(), exact.isnan())
    if not bool(finite.any()):
        return
    error = (actual.double() - exact)[finite].abs()
    budget = roundings * UNIT_ROUNDOFF[actual.dtype] * max(exact[finite].abs().max().item(), 1e-6)
    if eager is not None:
        budget += 2 * (eager.double() - exact)[finite].abs().max().item()
    worst = error.argmax()
    assert error[worst] <= budget, f"error {error[worst]:.3e} exceeds {budget:.3e} at flat index {int(worst)}"


def attention_pipeline(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_q_clusters: int,
    num_k_clusters: int,
    iters: int = 2,
    top_p: float = 0.9,
    min_k_ratio: float = 0.0,
    density: float | None = None,
    video: tuple[int, int] | None = None,
    valid: Tensor | None = None,
    compensation: bool = False,
    by_error: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rewritten attention from end to end, as a graph has it: output in token order and the block map."""
    num_tokens = query.shape[2]
    start, stop = video or (0, num_tokens)
    scale = query.shape[-1] ** -0.5
    unseeded = torch.zeros((), dtype=torch.bool, device=query.device)

    def cluster(x: Tensor, count: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seeds = torch.zeros(x.shape[0], x.shape[1], count, x.shape[3], device=x.device)
        video_mask = None if mask is None else mask[..., start:stop]
        labels, centroids, sizes = ops.kmeans(x[:, :, start:stop], seeds, unseeded, iters, video_mask)
        order, offsets = ops.cluster_order(labels, count, start, num_tokens, mask)
        return order, offsets, centroids, sizes

    q_order, q_offsets, q_centroids, q_sizes = cluster(query, num_q_clusters, None)
    k_order, k_offsets, k_centroids, k_sizes = cluster(key, num_k_clusters, valid)
    k, v = ops.permute_tokens(key, k_order), ops.permute_tokens(value, k_order)
    v_centroids = ops.cluster_means(v, k_offsets)
    limits = (scale, top_p, min_k_ratio, density)
    if by_error:
        block_map = ops.select_blocks_by_error(k, v, k_offsets, q_centroids, k_centroids, v_centroids, q_sizes, *limits)
    else:
        block_map = ops.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, *limits)
    means = (k_centroids, v_centroids) if compensation else (None, None)
    out, _ = ops.block_sparse_attention(query, k, v, q_offsets, k_offsets, block_map, scale, *means, q_order)
    return out, block_map
