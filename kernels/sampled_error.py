"""The ``svg2::`` op that measures what a sparse attention got wrong. Shapes are those of ``ops.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from svg2_compile.kernels import contracts
from svg2_compile.kernels.definition import define

__all__ = ["sampled_error"]


@define(contracts.SAMPLED_ERROR)
def sampled_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    q_order: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """The error of an attention's result, measured on a few rows that are computed exactly.

    query [B, Hq, Nq, D] and out [B, Hq, Nq, Dv] in token order, with q_order int32 [B, Hq, Nq] and q_offsets int32
    [B, Hq, Cq + 3]; permuted key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv] with k_offsets int32 [B, Hkv, Ck + 3]. Of
    every head ``rows`` clustered queries are taken, evenly spread over the order of the clusters and so over the
    clusters by their sizes, those of head h at the positions floor((r + phase_h) n / rows) of its n clustered queries,
    phase_h = h * 40503 mod 65536 / 65536. Their exact attention is over all keys but those of the null block.

    Returns the relative error || out - exact || / || exact || over the sampled rows of every head, float32 [B, Hq], and
    over those of all batch items and heads together, float32 []; 0 where nothing is clustered. Rounding of ``out`` to
    its dtype counts. A NaN among its inputs makes an error NaN.
    """
    return query.new_empty(query.shape[:2], dtype=torch.float32), query.new_empty((), dtype=torch.float32)
