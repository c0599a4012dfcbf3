"""Block-sparse attention that gathers full tiles of keys by id (SVG2 section 4.3), with EAR's compensation.

One program takes one tile of query rows of one query block and walks the block's list of key ids (``plan.py``). Programs
stay and draw their tiles from a counter, in the order of the heads, so that the keys of a head stay in the second-level
cache and nobody waits for a long row at the end. Queries are read, and results written, through the query order where one
is given: neither is ever permuted in memory. The ids of the next tile are loaded one step ahead, so that the loads of
its keys do not wait for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import (
    device_of,
    dot_precision,
    num_processors,
    padded,
    row_strides,
    rows_dense,
)
from svg2_compile.kernels.triton.plan import AttentionPlan, Blocks, label_keys, plan_rows, row_key_counts, write_lists
from svg2_compile.kernels.triton.primitives import LN_2, LOG2_E, head_base, kv_group_of, load_rows, store_rows
from svg2_compile.kernels.triton.workspace import ID_TILE, Workspace, plan_workspace
from svg2_compile.kernels.tuning import tuned

__all__ = ["block_density", "block_sparse_attention", "launch_attend"]

# Integers that no address alignment depends on: one compiled kernel serves all their values.
COUNTS = ["this_pass", "capacity", "first_group", "num_queries", "num_rows", "num_k_blocks"]


@triton.jit
def _softmax_step(acc, total, largest, score, value, to_log2, PRECISION: tl.constexpr):
    """One step of online softmax over a tile of keys.

    acc float32 [M, Dv], total and largest float32 [M]; ``largest`` and the exponents are in powers of two. The scale is
    folded into the one multiply-add before exp2, which needs to_log2 >= 0.
    """
    new_largest = tl.maximum(largest, tl.max(score, 1) * to_log2)
    shrink = tl.exp2(largest - new_largest)
    weight = tl.exp2(score * to_log2 - new_largest[:, None])
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_largest


@triton.jit
def _attend_to_list(
    acc, total, largest, query, key, value, ids, count, to_log2, k_n, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the ``count`` keys named by a padded list: full tiles without any mask, then one masked tail."""
    lane = tl.arange(0, BLOCK_N)
    full = count // BLOCK_N * BLOCK_N
    rows = tl.load(ids + lane)
    for first in tl.range(0, full, BLOCK_N):
        keys = load_rows(key, rows, rows, k_n, WIDTH, BLOCK_D, True)
        values = load_rows(value, rows, rows, v_n, VALUE_WIDTH, BLOCK_DV, True)
        rows = tl.load(ids + first + BLOCK_N + lane)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        acc, total, largest = _softmax_step(acc, total, largest, score, values, to_log2, PRECISION)
    if full < count:
        keys = load_rows(key, rows, rows, k_n, WIDTH, BLOCK_D, True)
        values = load_rows(value, rows, rows, v_n, VALUE_WIDTH, BLOCK_DV, True)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        named = lane < count - full
        score = tl.where(named[None, :], score, float("-inf"))
        values = tl.where(named[:, None], values, 0.0)  # the padding's value may be NaN, and 0 * NaN is NaN
        acc, total, largest = _softmax_step(acc, total, largest, score, values, to_log2, PRECISION)
    return acc, total, largest


@triton.jit
def _attend_to_means(
    acc, total, largest, query, k_means, v_means, offsets, ids, count, to_log2,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the ``count`` skipped clusters of a padded list: one key each, with the bias ln n."""
    lane = tl.arange(0, BLOCK_N)
    rows = tl.load(ids + lane)
    for first in tl.range(0, count, BLOCK_N):
        keys = load_rows(k_means, rows, rows, BLOCK_D, BLOCK_D, BLOCK_D, True)
        values = load_rows(v_means, rows, rows, BLOCK_DV, BLOCK_DV, BLOCK_DV, True)
        named = first + lane < count
        values = tl.where(named[:, None], values, 0.0)
        size = tl.load(offsets + rows + 1) - tl.load(offsets + rows)
        bias = tl.log2(size.to(tl.float32))
        rows = tl.load(ids + first + BLOCK_N + lane)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * to_log2 + bias[None, :]
        score = tl.where(named[None, :], score, float("-inf"))
        acc, total, largest = _softmax_step(acc, total, largest, score, values, 1.0, PRECISION)
    return acc, total, largest


@triton.jit(do_not_specialize=COUNTS)
def _attend(
    query, key, value, k_means, v_means, out, lse, q_order, q_offsets, k_offsets,
    key_counts, skipped_counts, places, tile_starts, tile_slots, pass_slots, pool, counters,
    this_pass, capacity, to_log2, sign, first_group, num_queries, num_q_heads, num_kv_heads, num_rows, num_k_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ID_TILE: tl.constexpr, HAS_ORDER: tl.constexpr,
    COMPENSATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All query tiles of one pass, drawn from a counter."""
    first_tile = tl.load(tile_starts + tl.load(pass_slots + this_pass))
    last_tile = tl.load(tile_starts + tl.load(pass_slots + this_pass + 1))
    tile = first_tile + tl.atomic_add(counters + this_pass, 1)
    while tile < last_tile:
        slot = tl.load(tile_slots + tile).to(tl.int64)
        group = slot // num_rows + first_group
        boundary = q_offsets + group * (num_rows + 1) + num_rows - 1 - slot % num_rows
        position = tl.load(boundary) + (tile - tl.load(tile_starts + slot)) * BLOCK_M + tl.arange(0, BLOCK_M)
        present = position < tl.load(boundary + 1)
        if HAS_ORDER:
            row = tl.load(q_order + group * num_queries + position, mask=present, other=0)
        else:
            row = position
        head = query + head_base(group, num_q_heads, q_b, q_h)
        queries = load_rows(head, row, present, q_n, WIDTH, BLOCK_D, False)
        # The maximum is taken of raw scores, so a negative scale goes into the queries' sign.
        queries = (queries * sign).to(query.dtype.element_ty)

        kv_group = kv_group_of(group, num_q_heads, num_kv_heads)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        count = tl.load(key_counts + slot)
        ids = pool + (tl.load(places + slot) - this_pass.to(tl.int64) * capacity)
        acc, total, largest = _attend_to_list(
            acc, total, largest, queries,
            key + head_base(kv_group, num_kv_heads, k_b, k_h), value + head_base(kv_group, num_kv_heads, v_b, v_h),
            ids, count, to_log2, k_n, v_n, WIDTH, BLOCK_D, VALUE_WIDTH, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
        if COMPENSATE:
            ids += (count + ID_TILE - 1) // ID_TILE * ID_TILE
            first_mean = kv_group * (num_k_blocks - 2)
            acc, total, largest = _attend_to_means(
                acc, total, largest, queries, k_means + first_mean * BLOCK_D, v_means + first_mean * BLOCK_DV,
                k_offsets + kv_group * (num_k_blocks + 1), ids, tl.load(skipped_counts + slot), to_log2,
                BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
            )  # fmt: skip
        # A row without any key has total 0: its out is 0 and its lse -inf. NaN stays NaN.
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        head = out + head_base(group, num_q_heads, out_b, out_h)
        store_rows(head, row, present, out_n, result.to(out.dtype.element_ty), VALUE_WIDTH, BLOCK_DV)
        row_lse = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(total)) * LN_2)
        tl.store(lse + group * num_queries + row, row_lse, mask=present)
        tile = first_tile + tl.atomic_add(counters + this_pass, 1)


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
    batch, q_heads, num_queries, _ = query.shape
    value_width = value.shape[3]
    if q_order is None:
        out = query.new_empty(batch, q_heads, num_queries, value_width)
    else:
        out = query.new_empty(batch, num_queries, q_heads, value_width).transpose(1, 2)
    lse = query.new_empty((batch, q_heads, num_queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    query, key, value = rows_dense(query), rows_dense(key), rows_dense(value)
    blocks = Blocks(q_offsets.contiguous(), k_offsets.contiguous(), block_map.contiguous().view(torch.int8))
    with device_of(query):
        means = None
        if k_centroids is not None and v_centroids is not None:
            means = (_mean_rows(k_centroids, key.dtype), _mean_rows(v_centroids, value.dtype))
        orders = (q_order if q_order is None else q_order.contiguous(), k_order if k_order is None else k_order.contiguous())
        _attend_in_passes(query, key, value, blocks, scale, means, orders, workspace_mb << 20, out, lse)
    return out, lse


def _mean_rows(means: Tensor, dtype: torch.dtype) -> Tensor:
    """Centroids as the kernel reads keys: in the tokens' dtype, rows padded with zeros."""
    missing = padded(means.shape[-1]) - means.shape[-1]
    return torch.nn.functional.pad(means.to(dtype), (0, missing)).contiguous()


def _attend_in_passes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    scale: float,
    means: tuple[Tensor, Tensor] | None,
    orders: tuple[Tensor | None, Tensor | None],
    limit_bytes: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Chunk by chunk of groups, pass by pass: write the lists, attend to them."""
    batch, q_heads, num_queries, width = query.shape
    kv_heads, num_keys = key.shape[1:3]
    config = dict(tuned("attention", query.device, query.dtype, max(width, value.shape[3]), num_keys))
    per_processor = config.pop("PROGRAMS_PER_SM")
    space = plan_workspace(
        num_groups=batch * q_heads,
        num_kv_groups=batch * kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        num_q_blocks=blocks.block_map.shape[2],
        num_k_blocks=blocks.block_map.shape[3],
        block_m=config["BLOCK_M"],
        compensate=means is not None,
        limit_bytes=limit_bytes,
    )
    block_of_key = label_keys(blocks.k_offsets, num_keys)
    pool = block_of_key.new_empty(space.pool_ids)
    grid = (per_processor * num_processors(query.device),)
    for first in range(0, batch * q_heads, space.groups_per_chunk):
        groups = slice(first, min(first + space.groups_per_chunk, batch * q_heads))
        plan = plan_rows(blocks, groups, num_queries, config["BLOCK_M"], means is not None, space)
        counters = pool.new_zeros(space.passes)
        for this_pass in range(space.passes):
            write_lists(plan, blocks, groups, block_of_key, orders[1], pool, this_pass, means is not None, space)
            launch_attend(
                grid, query, key, value, means, blocks, plan, pool, counters, this_pass, space, groups, scale, orders[0],
                out, lse, config,
            )  # fmt: skip


def launch_attend(
    grid: tuple[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: tuple[Tensor, Tensor] | None,
    blocks: Blocks,
    plan: AttentionPlan,
    pool: Tensor,
    counters: Tensor,
    this_pass: int,
    space: Workspace,
    groups: slice,
    scale: float,
    q_order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    config: dict[str, Any],
) -> None:
    """Attend to the lists of one pass."""
    num_rows, num_k_blocks = blocks.block_map.shape[2:]
    # A scale of 0 would turn masked scores into 0 * -inf; queries of 0 do the same without.
    to_log2, sign = (abs(scale) * LOG2_E.value, math.copysign(1.0, scale)) if scale != 0 else (1.0, 0.0)
    _attend[grid](
        *(query, key, value, *(means or (key, value)), out, lse, q_order if q_order is not None else plan.key_counts),
        *(blocks.q_offsets, blocks.k_offsets, plan.key_counts, plan.skipped_counts, plan.places, plan.tile_starts),
        *(plan.tile_slots, plan.pass_slots, pool, counters, this_pass, space.capacity),
        *(to_log2, sign, groups.start, query.shape[2], *blocks.heads),
        *(num_rows, num_k_blocks, *row_strides(query), *row_strides(key), *row_strides(value), *row_strides(out)),
        **{"WIDTH": query.shape[3], "BLOCK_D": padded(query.shape[3]), "VALUE_WIDTH": value.shape[3]},
        **{"BLOCK_DV": padded(value.shape[3]), "ID_TILE": ID_TILE, "HAS_ORDER": q_order is not None},
        **{"COMPENSATE": means is not None, "PRECISION": dot_precision(query.dtype), **config},
    )


def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected pairs over all pairs; see ``ops.block_density``."""
    if block_map.numel() == 0:
        return q_offsets.new_zeros(q_offsets.shape[:2], dtype=torch.float32)
    blocks = Blocks(q_offsets.contiguous(), k_offsets.contiguous(), block_map.contiguous().view(torch.int8))
    with device_of(block_map):
        keys = row_key_counts(blocks).flip(-1)
    q_sizes = q_offsets.diff(dim=-1).double()
    all_pairs = q_sizes.sum(dim=-1) * k_offsets[..., -1].repeat_interleave(
        block_map.shape[1] // k_offsets.shape[1], dim=1
    )
    return ((q_sizes * keys).sum(dim=-1) / all_pairs.clamp(min=1)).to(torch.float32)
