"""The error of compensating a cluster and its exact mass, streamed over its keys: never [query clusters, tokens] in
memory.

e_ij = |sum over keys t of cluster j of (exp(s q_i.k_t) - exp(s q_i.k_j)) (v_t - o_i)|^2, o_i being the output of q_i if
every cluster is compensated. With d_t = s q_i.(k_t - k_j) the weights are exp(s q_i.k_j) (exp(d_t) - 1), and the
sum is that of weight times v_t - v_j, plus the weights' sum times v_j - o_i: two matrix products of small numbers,
as in attention, with a running maximum of the exponents. The weights' sum also gives the mass: that of exp(d_t) is
theirs and n_j more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import (
    chunks,
    device_of,
    of_groups,
    padded,
    require_head_dim,
    row_strides,
    rows_dense,
)
from svg2_compile.kernels.triton.primitives import LN_2, LOG2_E, head_base, kv_group_of, load_rows

__all__ = ["ErrorInputs", "block_estimates", "error_inputs", "log_errors"]


def _launch_config(block_d: int, precision: str, mass: bool) -> dict[str, int]:
    """Tile and warps for rows ``block_d`` wide: results and what loads ahead stay in registers and in 99 KiB of shared
    memory. Without tensor cores ("ieee") the products need most registers, and masses some more."""
    if precision == "ieee":
        rows = 32 if block_d <= (64 if mass else 128) else 16
        return {"BLOCK_Q": rows, "BLOCK_K": rows, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_Q": 64 if block_d <= 128 else 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["first_group", "num_q_clusters", "num_k_clusters", "num_logits", "num_masses"])
def _log_errors(
    key, value, offsets, q_centroids, v_centroids, outputs, logits, log_error, log_mass,
    scale_log2, first_group, num_q_heads, num_kv_heads, num_q_clusters, num_k_clusters, num_logits, num_masses,
    k_b, k_h, k_n, v_b, v_h, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """ln e_ij of a tile of query clusters and one key cluster, and with MASS ln m_ij; -inf for an empty one.

    With MASS there is one program more: of the context block, relative to the logit of its first key, without error.
    """
    cluster, tile = tl.program_id(0), tl.program_id(1)
    group = tl.program_id(2) + first_group
    kv_group = kv_group_of(group, num_q_heads, num_kv_heads).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = row < num_q_clusters
    centroids = q_centroids + group.to(tl.int64) * num_q_clusters * WIDTH
    query = load_rows(centroids, row, is_row, WIDTH, WIDTH, BLOCK_D)
    line = tl.program_id(2).to(tl.int64) * num_q_clusters + row
    mean_logit = tl.load(logits + line * num_logits + cluster, mask=is_row, other=0.0) * scale_log2
    column = tl.arange(0, BLOCK_DV)
    # The context's program has no cluster: widths of 0, since newer interpreters take no mask joined with a scalar one.
    is_cluster = (cluster < num_k_clusters).to(tl.int32)
    place = (kv_group * num_k_clusters + cluster) * VALUE_WIDTH + column
    mean = tl.load(v_centroids + place, mask=column < VALUE_WIDTH * is_cluster, other=0.0)

    boundary = offsets + kv_group * (num_k_clusters + 3) + cluster
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    key += head_base(kv_group, num_kv_heads, k_b, k_h)
    value += head_base(kv_group, num_kv_heads, v_b, v_h)
    largest = tl.zeros([BLOCK_Q], tl.float32)  # of the exponents, in powers of two; that of the centroid itself is 0
    weight_sum = tl.zeros([BLOCK_Q], tl.float32)
    error = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for first in range(begin, end, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        present = token < end
        keys = load_rows(key, token, present, k_n, WIDTH, BLOCK_D).to(tl.float32)
        exponent = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2 - mean_logit[:, None]
        exponent = tl.where(present[None, :], exponent, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(exponent, 1))
        weight = tl.exp2(exponent - new_largest[:, None]) - tl.exp2(-new_largest)[:, None]
        weight = tl.where(present[None, :], weight, 0.0)
        shrink = tl.exp2(largest - new_largest)
        spread = load_rows(value, token, present, v_n, VALUE_WIDTH, BLOCK_DV).to(tl.float32) - mean[None, :]
        error = error * shrink[:, None] + tl.dot(weight, spread, input_precision=PRECISION)
        weight_sum = weight_sum * shrink + tl.sum(weight, 1)
        largest = new_largest
    output = load_rows(outputs + tl.program_id(2).to(tl.int64) * num_q_clusters * VALUE_WIDTH,
                       row, is_row, VALUE_WIDTH, VALUE_WIDTH, BLOCK_DV)  # fmt: skip
    error += weight_sum[:, None] * (mean[None, :] - output)
    total = tl.log(tl.sum(error * error, 1)) + 2.0 * LN_2 * (largest + mean_logit)
    # An empty block's centroid may be anything.
    total = tl.where(end > begin, total, float("-inf"))
    tl.store(log_error + line * num_k_clusters + cluster, total, mask=row < num_q_clusters * is_cluster)
    if MASS:
        mass = weight_sum + (end - begin).to(tl.float32) * tl.exp2(-largest)
        total = tl.where(end > begin, tl.log(mass) + LN_2 * (largest + mean_logit), float("-inf"))
        tl.store(log_mass + line * num_masses + cluster, total, mask=is_row)


class ErrorInputs(NamedTuple):
    """What the estimate reads for all heads. Permuted key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv], dense in their
    last dimension; k_offsets int32 [B, Hkv, Ck + 3] and k_sizes int32 [B, Hkv, Ck]; v_centroids float32
    [B, Hkv, Ck, Dv]."""

    key: Tensor
    value: Tensor
    k_offsets: Tensor
    k_sizes: Tensor
    v_centroids: Tensor


def error_inputs(key: Tensor, value: Tensor, k_offsets: Tensor, v_centroids: Tensor) -> ErrorInputs:
    """The arguments in the layout that the kernel reads."""
    require_head_dim("select_blocks_by_error", key.shape[3], value.shape[3])
    k_sizes = k_offsets.diff(dim=-1).narrow(-1, 0, v_centroids.shape[2])
    return ErrorInputs(rows_dense(key), rows_dense(value), k_offsets.contiguous(), k_sizes, v_centroids.contiguous())


def log_errors(
    inputs: ErrorInputs,
    q_centroids: Tensor,
    logits: Tensor,
    scale: float,
    groups: slice,
    log_mass: Tensor | None = None,
) -> Tensor:
    """ln e_ij float32 [groups, Cq, Ck] for some (batch, query head) groups; logits float32 [groups, Cq, Ck] are
    q_i.k_j, not scaled. With log_mass float32 [groups, Cq, Ck + 2] the masses are written there, but for the null
    block's; then logits have one column more, of the context's first key."""
    _, kv_heads, _, width = inputs.key.shape
    q_heads, num_q_clusters = q_centroids.shape[1:3]
    num_k_clusters, value_width = inputs.v_centroids.shape[2:]
    log_error = logits.new_empty(*logits.shape[:2], num_k_clusters)
    # bfloat16 and float16 keys are exact in TF32; query centroids and weights are rounded, to 2^-11.
    precision = "tf32" if inputs.key.dtype != torch.float32 and torch.version.hip is None else "ieee"
    block_d, block_dv = padded(width), padded(value_width)
    config = _launch_config(max(block_d, block_dv), precision, log_mass is not None)
    grid = (logits.shape[2], triton.cdiv(num_q_clusters, config["BLOCK_Q"]), groups.stop - groups.start)
    outputs = _compensated_outputs(inputs, logits.narrow(2, 0, num_k_clusters), scale, groups, q_heads // kv_heads)
    with device_of(logits):
        _log_errors[grid](
            *(inputs.key, inputs.value, inputs.k_offsets, q_centroids.contiguous(), inputs.v_centroids),
            *(outputs, logits, log_error, log_error if log_mass is None else log_mass, scale * LOG2_E.value),
            *(groups.start, q_heads, kv_heads, num_q_clusters, num_k_clusters, logits.shape[2], num_k_clusters + 2),
            *(*row_strides(inputs.key), *row_strides(inputs.value)),
            **{"WIDTH": width, "BLOCK_D": block_d, "VALUE_WIDTH": value_width, "BLOCK_DV": block_dv},
            **{"PRECISION": precision, "MASS": log_mass is not None, **config},
        )
    return log_error


def block_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact masses and errors of compensation; see ``ops.block_estimates``. A mass is as exact as products of 16-bit
    keys with query centroids rounded to 2^-11."""
    batch, q_heads, num_q_clusters, _ = q_centroids.shape
    num_k_clusters = k_centroids.shape[2]
    log_mass = q_centroids.new_full((batch, q_heads, num_q_clusters, num_k_clusters + 2), float("-inf"))
    if log_mass.numel() == 0 or key.shape[2] == 0:
        return log_mass, log_mass.narrow(3, 0, num_k_clusters).clone()
    inputs = error_inputs(key, value, k_offsets, v_centroids)
    # What the logits of a block are taken relative to: its centroid, and the context's first key.
    begin = k_offsets.narrow(2, num_k_clusters, 1).clamp(max=key.shape[2] - 1).to(torch.int64)
    first = key.gather(2, begin.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])).to(torch.float32)
    references = torch.cat((k_centroids, first), dim=2)
    sharing = q_heads // key.shape[1]
    log_error = []
    for groups in chunks(batch * q_heads, 5 * 4 * num_q_clusters * num_k_clusters):
        queries, keys = of_groups(q_centroids, groups), of_groups(references, groups, sharing)
        logits = torch.matmul(queries, keys.transpose(-1, -2))
        of_chunk = (0, groups.start, groups.stop - groups.start)
        masses = log_mass.flatten(0, 1).narrow(*of_chunk)
        errors = log_errors(inputs, q_centroids, logits, scale, groups, masses)
        log_error.append(errors)
    return log_mass, torch.cat(log_error).view(batch, q_heads, num_q_clusters, num_k_clusters)


def _compensated_outputs(inputs: ErrorInputs, logits: Tensor, scale: float, groups: slice, sharing: int) -> Tensor:
    """o_i, what a query centroid gets if every cluster is compensated: float32 [groups, Cq, Dv]."""
    sizes = of_groups(inputs.k_sizes, groups, sharing).unsqueeze(1)
    # An empty cluster's centroid may be anything.
    log_mass = (logits * scale + sizes.log()).masked_fill(sizes == 0, -math.inf)
    return torch.softmax(log_mass, dim=-1) @ of_groups(inputs.v_centroids, groups, sharing)
