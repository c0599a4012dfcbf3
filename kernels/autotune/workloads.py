"""What a kernel is timed on: one call of its op, on tokens of one shape, and the rehearsal of that call.

Blocks and the block map are random: a density is met closely enough, and tile sizes do not see what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.kernels.tuning.tables import TuningKey

__all__ = ["Workload"]

HEAD_KERNEL = {"attention": "attend", "kmeans_assign": "_assign"}  # the launch that a configuration is about


@dataclass(frozen=True)
class Workload:
    """Tune ``kernel`` for self-attention over [1, num_heads, num_tokens, head_dim] at ``density``."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    num_tokens: int
    num_heads: int
    density: float = 0.25

    @property
    def key(self) -> TuningKey:
        return TuningKey.of(self.kernel, self.dtype, self.head_dim, self.num_tokens, self.density)

    @property
    def clusters(self) -> tuple[int, int]:
        """Query clusters, key clusters."""
        return QUERY_CLUSTERS.count(self.num_tokens), KEY_CLUSTERS.count(self.num_tokens)

    def call(self, device: torch.device, run: ModuleType = ops, seed: int | None = 0) -> Callable[[], Tensor]:
        """A function that runs the kernel's op once on fixed inputs and returns its main result.

        run: the module whose functions are called: the ops, or one implementation of them. seed: None where the inputs
        are fake tensors.
        """
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        def tokens(count: int, dtype: torch.dtype = self.dtype) -> Tensor:
            shape = (1, self.num_heads, count, self.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        num_q, num_k = self.clusters
        if self.kernel in ("kmeans_assign", "cpu_kmeans"):
            x, start = tokens(self.num_tokens), tokens(num_k, torch.float32)
            seeded = torch.ones((), dtype=torch.bool, device=device)
            return lambda: run.kmeans(x, start, seeded, 2)[1]
        query, key, value = tokens(self.num_tokens), tokens(self.num_tokens), tokens(self.num_tokens)
        k_offsets = self._offsets(num_k, device, seed)
        if self.kernel == "cpu_error":
            means = [tokens(num_k, torch.float32) for _ in range(2)]
            queries, sizes = tokens(num_q, torch.float32), torch.ones(1, self.num_heads, num_q, dtype=torch.int32)
            args = (key, value, k_offsets, queries, *means, sizes, self.head_dim**-0.5, 0.9, 0.1, self.density)
            return lambda: run.select_blocks_by_error(*args)
        shape = (1, self.num_heads, num_q + 2, num_k + 2)
        block_map = torch.rand(shape, generator=generator, device=device) < self.density
        offsets = (self._offsets(num_q, device, seed), k_offsets)
        return lambda: run.block_sparse_attention(query, key, value, *offsets, block_map, self.head_dim**-0.5)[0]

    def _offsets(self, num_clusters: int, device: torch.device, seed: int | None) -> Tensor:
        """Boundaries of clusters of uneven sizes (log-normal, sigma 0.5), and of two empty blocks."""
        if seed is None:
            return torch.empty(1, self.num_heads, num_clusters + 3, dtype=torch.int32, device=device)
        weights = torch.exp(0.5 * torch.randn(num_clusters, generator=torch.Generator().manual_seed(num_clusters)))
        ends = (weights.cumsum(0) / weights.sum() * self.num_tokens).round().to(torch.int32)
        ends[-1] = self.num_tokens
        offsets = torch.nn.functional.pad(ends, (1, 2), value=self.num_tokens)
        offsets[0] = 0
        return offsets.expand(1, self.num_heads, -1).contiguous().to(device)
