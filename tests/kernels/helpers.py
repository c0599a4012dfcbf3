"""Inputs and expectations that the kernel tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.first_order import FAR_MEMBERS, estimates_for_terms
from svg2_compile.kernels.reference import implementation as reference

# What one rounding of the result costs, relative to its size, in each dtype.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}

SELECTION_LIMITS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9, "min_k_ratio": 0.0},
    "top_p, at least a tenth": {"top_p": 0.9, "min_k_ratio": 0.1},
    "at least half": {"top_p": 0.2, "min_k_ratio": 0.5},
    "at least one": {"top_p": 0.0, "min_k_ratio": 0.0},
    "everything": {"top_p": 1.0, "min_k_ratio": 0.0},
    "density": {"top_p": 0.9, "min_k_ratio": 0.0, "density": 0.3},
    "density zero": {"top_p": 0.9, "min_k_ratio": 0.0, "density": 0.0},
    "density one": {"top_p": 0.9, "min_k_ratio": 0.0, "density": 1.0},
}
"""Every way to say how much is selected."""
EDGE_SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"num_queries": 1, "num_keys": 1, "num_q_clusters": 1, "num_k_clusters": 1, "keep": 1.0},
    "grouped heads, batch 2": {"batch": 2, "q_heads": 6, "kv_heads": 2},
    "one cluster": {"num_q_clusters": 1, "num_k_clusters": 1},
    "few keys kept": {"keep": 0.03},
    "nothing kept": {"keep": 0.0},
    "all kept": {"keep": 1.1},
    "no queries": {"num_queries": 0},
    "no keys": {"num_keys": 0},
    "no batch": {"batch": 0},
    "no heads": {"q_heads": 0, "kv_heads": 0},
}
"""Arguments of make_problem at the edges of what attention may be given."""


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


@dataclass(frozen=True)
class FirstOrder:
    """A problem with what first-order compensation knows of it, all from the oracle in float64, of the map given."""

    problem: Problem
    q_centroids: Tensor
    q_variances: Tensor
    far_members: Tensor
    log_mass: Tensor
    log_error: Tensor
    residual_of_all: Tensor
    residual: Tensor
    slope: Tensor

    @classmethod
    def of(cls, problem: Problem) -> FirstOrder:
        q_centroids = reference.cluster_means(problem.query, problem.q_offsets, compute_dtype=torch.float64)
        squares = reference.cluster_means(problem.query.double().square(), problem.q_offsets)
        q_variances = (squares - q_centroids.square()).clamp(min=0)
        order = torch.arange(problem.query.shape[2], dtype=torch.int32).expand(problem.query.shape[:3])
        queries = (problem.query, order, problem.q_offsets, q_centroids)
        far_members = reference.farthest_members(*queries, 3, compute_dtype=torch.float64)
        means = (q_centroids, problem.k_centroids, problem.v_centroids)
        tokens = (problem.key, problem.value, problem.k_offsets)
        estimates = reference.first_order_estimates(*tokens, *means, problem.scale, compute_dtype=torch.float64)
        terms = reference.first_order_terms(
            *tokens, *means, estimates[0], problem.block_map, problem.scale, compute_dtype=torch.float64
        )
        return cls(problem, q_centroids, q_variances, far_members, *estimates, *terms)

    @property
    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_centroids, self.problem.k_centroids, self.problem.v_centroids

    @property
    def estimate_args(self) -> tuple[Any, ...]:
        problem = self.problem
        return problem.key, problem.value, problem.k_offsets, *self.means, problem.scale

    def select_args(self, density: float, members: bool = True) -> tuple[Any, ...]:
        problem, count = self.problem, self.q_centroids.shape[2]
        q_sizes = problem.q_offsets.diff(dim=-1)[..., :count].contiguous()
        estimates = (self.log_mass, self.log_error, self.q_variances)
        arguments = (*estimates, problem.k_centroids, q_sizes, problem.k_offsets, problem.scale, torch.tensor(density))
        return (*arguments, self.far_members) if members else arguments

    @property
    def term_args(self) -> tuple[Any, ...]:
        return *self.estimate_args[:-1], self.log_mass, self.problem.block_map, self.problem.scale

    @property
    def attention_args(self) -> tuple[Any, ...]:
        return *self.problem.args()[:7], *self.means, self.log_mass, self.residual, self.slope


def sample_arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op, with and without its optional ones."""
    problem = make_problem(batch=2, q_heads=4, kv_heads=2, num_queries=50, num_keys=50)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 50, 16, generator=generator)
    valid = torch.rand(2, 1, 50, generator=generator) < 0.8
    labels, q_centroids, q_sizes = ops.kmeans(x, torch.zeros(2, 4, 4, 16), torch.tensor(False), 1)
    order, offsets = ops.cluster_order(labels, 4, 0, 50)
    k_sizes = problem.k_offsets.diff(dim=-1)[..., :9].contiguous()
    limits = (0.25, 0.9, 0.1)
    means = (q_centroids, problem.k_centroids, problem.v_centroids, q_sizes)
    tokens = (problem.key, problem.value, problem.k_offsets)
    first_order = FirstOrder.of(problem)
    by_mass = (q_centroids, problem.k_centroids, q_sizes, k_sizes, *limits)
    return {
        "kmeans": [(x, q_centroids, torch.tensor(True), 2), (x.bfloat16(), q_centroids, torch.tensor(False), 1, valid)],
        "cluster_order": [(labels, 4, 0, 50), (labels[..., :40].contiguous(), 4, 3, 50, valid)],
        "select_blocks": [by_mass, (*by_mass, 0.3)],
        "permute_tokens": [(x, order), (x.transpose(1, 2).contiguous().transpose(1, 2), order)],
        "unpermute_tokens": [(x, order)],
        "cluster_means": [(x, offsets)],
        "block_sparse_attention": [problem.args(), problem.args(True), (*problem.args(), order, order[:, :2], 64)],
        "select_blocks_by_error": [(*tokens, *means, *limits), (*tokens, *means, *limits, 0.3)],
        "cluster_variances": [(x, order, offsets, q_centroids), (x.bfloat16(), order, offsets, q_centroids)],
        "farthest_members": [(x, order, offsets, q_centroids, 3), (x.bfloat16(), order, offsets, q_centroids, 1)],
        "block_estimates": [first_order.estimate_args],
        "first_order_estimates": [first_order.estimate_args],
        "select_blocks_of_layer": [
            first_order.select_args(0.3),
            first_order.select_args(0.3, members=False),
            first_order.select_args(1.0),
        ],
        "first_order_terms": [first_order.term_args, (*first_order.term_args, first_order.residual_of_all)],
        "first_order_attention": [
            first_order.attention_args,
            (*first_order.attention_args, order, order[:, :2], 64),
        ],
        "sampled_error": [(x, *tokens[:2], x * 0.9, order, offsets, problem.k_offsets, 0.25, 8)],
        "block_density": [(problem.q_offsets, problem.k_offsets, problem.block_map)],
    }


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
    first_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rewritten attention from end to end, as a graph has it: output in token order and the block map."""
    num_tokens = query.shape[2]
    start, stop = video or (0, num_tokens)
    scale = query.shape[-1] ** -0.5
    unseeded = torch.zeros((), dtype=torch.bool, device=query.device)

    def cluster(x: Tensor, count: int, mask: Tensor | None) -> tuple[Tensor, ...]:
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
    blocks = (q_offsets, k_offsets)
    if first_order:
        q_means = (q_centroids, k_centroids, v_centroids)
        q_variances = ops.cluster_variances(query, q_order, q_offsets, q_centroids)
        log_mass, log_error, *of_all = estimates_for_terms(key.device)(k, v, k_offsets, *q_means, scale)
        budget = torch.full((), 1.0 if density is None else density, device=query.device)
        estimates = (log_mass, log_error, q_variances)
        far_members = ops.farthest_members(query, q_order, q_offsets, q_centroids, FAR_MEMBERS)
        sizes = (q_sizes, k_offsets)
        block_map = ops.select_blocks_of_layer(*estimates, k_centroids, *sizes, scale, budget, far_members)
        terms = ops.first_order_terms(k, v, k_offsets, *q_means, log_mass, block_map, scale, *of_all)
        tokens = (query, k, v, *blocks, block_map, scale)
        return ops.first_order_attention(*tokens, *q_means, log_mass, *terms, q_order)[0], block_map
    if by_error:
        block_map = ops.select_blocks_by_error(k, v, k_offsets, q_centroids, k_centroids, v_centroids, q_sizes, *limits)
    else:
        block_map = ops.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, *limits)
    means = (k_centroids, v_centroids) if compensation else (None, None)
    out, _ = ops.block_sparse_attention(query, k, v, *blocks, block_map, scale, *means, q_order)
    return out, block_map


def masked_dense(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """Dense attention; keys that are not ``valid`` [B, 1, N] take no part."""
    mask = None if valid is None else valid.unsqueeze(2)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def check_identity(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, **options: Any) -> None:
    """The rewritten attention with every cluster kept equals dense attention. options: of attention_pipeline."""
    out, _ = attention_pipeline(query, key, value, top_p=1.0, valid=valid, **options)
    exact = masked_dense(query.double(), key.double(), value.double(), valid)
    assert_within_budget(out, exact, masked_dense(query, key, value, valid))
