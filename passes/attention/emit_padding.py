"""Insert what a rewritten attention needs of its padding: which keys are attended, and zeros for the other queries.

mask [B, 1, 1, N], means "exclude"   ->   logical_not, squeeze, expand: valid, bool [B, 1, N]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.attention.additive import MOST_EXCLUDING_BIAS
from svg2_compile.passes.attention.masks import KeyPadding, QueryPadding
from svg2_compile.passes.graph.builder import GraphBuilder

__all__ = ["emit_valid", "emit_zero_padding"]


def emit_valid(build: GraphBuilder, padding: KeyPadding, batch: Any, num_tokens: Any) -> fx.Node:
    """Insert nodes that yield bool [batch, 1 or H, num_tokens], True where a key is attended."""
    mask = padding.mask
    if padding.means == "exclude":
        mask = build.call(torch.ops.aten.logical_not.default, mask)
    elif padding.means == "bias":
        threshold = padding.threshold if math.isfinite(padding.threshold) else MOST_EXCLUDING_BIAS
        mask = build.call(torch.ops.aten.gt.Scalar, mask, threshold)
    rank = len(build.value(mask).shape)
    if rank >= 2:
        mask = build.call(torch.ops.aten.squeeze.dim, mask, -2)
    for _ in range(rank - 1, 3) if rank >= 2 else range(rank, 3):
        mask = build.call(torch.ops.aten.unsqueeze.default, mask, 0)
    return build.call(torch.ops.aten.expand.default, mask, [batch, -1, num_tokens], name="valid")


def emit_zero_padding(build: GraphBuilder, queries: QueryPadding, out: fx.Node) -> fx.Node:
    """Insert nodes that yield ``out`` [B, H, Nq, Dv] with zeros for the queries that do not attend."""
    padding = build.call(torch.ops.aten.logical_not.default, queries.mask)
    if queries.transposed:
        padding = build.call(torch.ops.aten.transpose.int, padding, -2, -1)
    return build.call(torch.ops.aten.masked_fill.Scalar, out, padding, 0.0, name="of_attending_queries")
