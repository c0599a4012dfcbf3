"""The attention kernel: tiles of query rows against lists of key ids (SVG2 section 4.3), with EAR's compensation.

One program takes one tile of query rows of one query block and walks the block's list of key ids (``plan.py``).
Programs stay and draw their tiles from a counter, in the order of the heads, so that the keys of a head stay in the
second-level cache and nobody waits for a long row at the end. Skipped clusters are taken last: then the part of the
row's sum that is skipped, which the first-order terms are weighted by, is known for free. Queries are read, and results
written, through the query order where one is given: neither is ever permuted in memory. The ids of the next tile are
loaded one step ahead, so that the loads of its keys do not wait for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svg2_compile.kernels.triton.primitives import (
    EXACT,
    LN_2,
    gather_rows,
    head_base,
    kv_group_of,
    load_rows,
    store_rows,
)

__all__ = ["attend"]

# Integers that no address alignment depends on: one compiled kernel serves all their values.
COUNTS = ["this_pass", "capacity", "first_group", "num_queries", "num_rows", "num_k_blocks"]


@triton.jit
def _softmax_step(acc, total, largest, score, value, to_log2):
    """One step of online softmax over a tile of keys.

    acc float32 [M, Dv], total and largest float32 [M]; ``largest`` and the exponents are in powers of two. The scale is
    folded into the one multiply-add before exp2, which needs to_log2 >= 0.
    """
    new_largest = tl.maximum(largest, tl.max(score, 1) * to_log2)
    shrink = tl.exp2(largest - new_largest)
    weight = tl.exp2(score * to_log2 - new_largest[:, None])
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=EXACT)
    return acc, total, new_largest


@triton.jit
def _attend_to_list(
    query, key, value, ids, count, to_log2, k_n, v_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to the ``count`` keys named by a padded list: one masked tile, then full tiles without any mask.

    The masked one is the list's last, taken first: its loads are not pipelined and need registers that the accumulator
    does not yet take.
    """
    lane = tl.arange(0, BLOCK_N)
    full = tl.maximum(count - 1, 0) // BLOCK_N * BLOCK_N
    named = lane < count - full
    # Lanes past the end repeat a key of the row's own: another's value may be NaN, and 0 * NaN is NaN.
    rows = tl.where(named, tl.load(ids + full + lane, mask=named, other=0), tl.load(ids, mask=count > 0, other=0))
    keys = gather_rows(key, rows, k_n, WIDTH, BLOCK_D, WIDE)
    score = tl.where(named[None, :], tl.dot(query, tl.trans(keys), input_precision=EXACT), float("-inf"))
    # A row without keys of its own leaves the scale to the means that follow, however small they are.
    largest = tl.where(count > 0, tl.max(score, 1) * to_log2, -1e30)
    weight = tl.exp2(score * to_log2 - largest[:, None])
    total = tl.sum(weight, 1)
    values = gather_rows(value, rows, v_n, VALUE_WIDTH, BLOCK_DV, WIDE)
    acc = tl.dot(weight.to(value.dtype.element_ty), values, input_precision=EXACT)
    rows = tl.load(ids + lane)
    for first in tl.range(0, full, BLOCK_N):
        keys = gather_rows(key, rows, k_n, WIDTH, BLOCK_D, WIDE)
        values = gather_rows(value, rows, v_n, VALUE_WIDTH, BLOCK_DV, WIDE)
        rows = tl.load(ids + first + BLOCK_N + lane)
        score = tl.dot(query, tl.trans(keys), input_precision=EXACT)
        acc, total, largest = _softmax_step(acc, total, largest, score, values, to_log2)
    return acc, total, largest


@triton.jit
def _attend_to_means(
    acc, total, largest, query, k_means, v_means, biases, ids, count, to_log2,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the ``count`` skipped clusters of a padded list: one key each, with a bias float32 [Ck] in powers of
    two."""
    lane = tl.arange(0, BLOCK_N)
    own = tl.load(ids, mask=count > 0, other=0)
    rows = tl.where(lane < count, tl.load(ids + lane, mask=lane < count, other=0), own)
    bias = tl.load(biases + rows)
    for first in tl.range(0, count, BLOCK_N):
        named = first + lane < count
        next_named = first + BLOCK_N + lane < count
        keys = gather_rows(k_means, rows, BLOCK_D, BLOCK_D, BLOCK_D, False)
        values = gather_rows(v_means, rows, BLOCK_DV, BLOCK_DV, BLOCK_DV, False)
        score = tl.dot(query, tl.trans(keys), input_precision=EXACT) * to_log2 + bias[None, :]
        score = tl.where(named[None, :], score, float("-inf"))
        rows = tl.where(next_named, tl.load(ids + first + BLOCK_N + lane, mask=next_named, other=0), own)
        bias = tl.load(biases + rows)
        acc, total, largest = _softmax_step(acc, total, largest, score, values, 1.0)
    return acc, total, largest


@triton.jit
def _first_order(
    query, row, present, q_n, share, skipped, shift, slope,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """share (D_i + (q - q_i) G) of a tile, float32 [M, Dv]: shift [Dv] is D_i - q_i G, slope [D, Dv] is G. 0 where
    nothing is skipped, whatever the terms are.

    The queries are read again, some dimensions at a time: kept in registers until here, they would crowd out the
    accumulator of wide heads.
    """
    STEP: tl.constexpr = min(BLOCK_D, 64)
    column = tl.arange(0, BLOCK_DV)
    term = tl.zeros([row.shape[0], BLOCK_DV], tl.float32) + tl.load(shift + column)[None, :]
    for part in tl.static_range(BLOCK_D // STEP):
        dim = part * STEP + tl.arange(0, STEP)
        mask = present[:, None] & (dim[None, :] < WIDTH)
        queries = tl.load(query + row.to(tl.int64)[:, None] * q_n + dim[None, :], mask=mask, other=0.0)
        matrix = tl.load(slope + dim[:, None] * BLOCK_DV + column[None, :])
        term = tl.dot(queries, matrix, term, input_precision=EXACT)
    return tl.where(skipped > 0, share[:, None] * term, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def attend(
    query, key, value, k_means, v_means, biases, shifts, slopes, out, lse, q_order, q_offsets,
    rows_of_slots, key_counts, skipped_counts, places, tile_starts, tile_slots, pass_slots, pool, counters,
    this_pass, capacity, to_log2, sign, first_group, num_queries, num_q_heads, num_kv_heads, num_rows, num_k_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MEANS_N: tl.constexpr, HAS_ORDER: tl.constexpr,
    COMPENSATE: tl.constexpr, FIRST_ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All query tiles of one pass, drawn from a counter."""
    first_tile = tl.load(tile_starts + tl.load(pass_slots + this_pass))
    last_tile = tl.load(tile_starts + tl.load(pass_slots + this_pass + 1))
    tile = first_tile + tl.atomic_add(counters + this_pass, 1)
    while tile < last_tile:
        slot = tl.load(tile_slots + tile).to(tl.int64)
        group = slot // num_rows + first_group
        block = tl.load(rows_of_slots + slot)
        boundary = q_offsets + group * (num_rows + 1) + block
        position = tl.load(boundary) + (tile - tl.load(tile_starts + slot)) * BLOCK_M + tl.arange(0, BLOCK_M)
        present = position < tl.load(boundary + 1)
        if HAS_ORDER:
            row = tl.load(q_order + group * num_queries + position, mask=present, other=0)
        else:
            row = position
        head = query + head_base(group, num_q_heads, q_b, q_h)
        queries = load_rows(head, row, present, q_n, WIDTH, BLOCK_D)
        # The maximum is taken of raw scores, so a negative scale goes into the queries' sign.
        queries = (queries * sign).to(query.dtype.element_ty)

        kv_group = kv_group_of(group, num_q_heads, num_kv_heads)
        count = tl.load(key_counts + slot)
        ids = pool + (tl.load(places + slot) - this_pass.to(tl.int64) * capacity)
        acc, total, largest = _attend_to_list(
            queries,
            key + head_base(kv_group, num_kv_heads, k_b, k_h), value + head_base(kv_group, num_kv_heads, v_b, v_h),
            ids, count, to_log2, k_n, v_n, WIDTH, BLOCK_D, VALUE_WIDTH, BLOCK_DV, BLOCK_N, WIDE,
        )  # fmt: skip
        if COMPENSATE:
            ids += count
            first_mean = kv_group * (num_k_blocks - 2)
            own_total, own_largest = total, largest
            skipped = tl.load(skipped_counts + slot)
            own_biases = biases + first_mean
            if FIRST_ORDER:
                # Context and null blocks come after the clusters and are not compensated.
                skipped = tl.where(block < num_rows - 2, skipped, 0)
                own_cluster = group * (num_rows - 2) + tl.minimum(block, num_rows - 3)
                own_biases = biases + own_cluster * (num_k_blocks - 2)
            acc, total, largest = _attend_to_means(
                acc, total, largest, queries, k_means + first_mean * BLOCK_D, v_means + first_mean * BLOCK_DV,
                own_biases, ids, skipped, to_log2, BLOCK_D, BLOCK_DV, MEANS_N,
            )  # fmt: skip
            if FIRST_ORDER:
                share = total - own_total * tl.exp2(own_largest - largest)
                acc += _first_order(
                    head, row, present, q_n, share, skipped, shifts + own_cluster * BLOCK_DV,
                    slopes + kv_group * BLOCK_D * BLOCK_DV, WIDTH, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
        # A row without any key has total 0: its out is 0 and its lse -inf. NaN stays NaN.
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        head = out + head_base(group, num_q_heads, out_b, out_h)
        store_rows(head, row, present, out_n, result.to(out.dtype.element_ty), VALUE_WIDTH, BLOCK_DV)
        row_lse = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(total)) * LN_2)
        tl.store(lse + group * num_queries + row, row_lse, mask=present)
        tile = first_tile + tl.atomic_add(counters + this_pass, 1)
