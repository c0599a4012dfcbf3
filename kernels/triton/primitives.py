"""Functions that several kernels are built of. Each works on tiles in registers; shapes are in the comments."""

from __future__ import annotations

import triton
import triton.language as tl

# Products of 16-bit inputs are exact on the tensor cores anyway; for float32 this keeps TF32 out, and costs speed.
EXACT = tl.constexpr("ieee")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def kv_group_of(group, NUM_Q_HEADS, NUM_KV_HEADS):
    """Index of the key/value (batch, head) that a query (batch, head) reads."""
    batch = group // NUM_Q_HEADS
    head = group % NUM_Q_HEADS
    return batch * NUM_KV_HEADS + head // (NUM_Q_HEADS // NUM_KV_HEADS)


@triton.jit
def head_base(group, NUM_HEADS, stride_b, stride_h):
    """Offset of the first element of a (batch, head), int64."""
    group = group.to(tl.int64)
    return (group // NUM_HEADS) * stride_b + (group % NUM_HEADS) * stride_h


@triton.jit
def gather_rows(head, rows, stride_n, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Tile [rows, BLOCK_D] of rows that all exist; offsets within the head have 64 bits if WIDE, else 32."""
    columns = tl.arange(0, BLOCK_D)
    if WIDE:
        rows = rows.to(tl.int64)
    pointers = head + (rows[:, None] * stride_n + columns[None, :])
    if WIDTH == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def load_rows(head, rows, row_mask, stride_n, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [rows, BLOCK_D] of the head's rows, zero where masked; addresses are 64 bits wide."""
    columns = tl.arange(0, BLOCK_D)
    pointers = head + rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
    if WIDTH == BLOCK_D:
        tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=row_mask[:, None] & (columns[None, :] < WIDTH), other=0.0)
    return tile


@triton.jit
def store_rows(head, rows, row_mask, stride_n, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the tile [rows, BLOCK_D] to the head's rows."""
    columns = tl.arange(0, BLOCK_D)
    pointers = head + rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
    if WIDTH == BLOCK_D:
        tl.store(pointers, tile, mask=row_mask[:, None])
    else:
        tl.store(pointers, tile, mask=row_mask[:, None] & (columns[None, :] < WIDTH))


@triton.jit
def sortable(value):
    """float32 -> int64 in [0, 2^32) in the same order (-inf first); NaN anywhere."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def keep_until(key, cost, budget, present):
    """Which entries of a row to keep: the largest keys until their cost first reaches the budget.

    key int64 [n] in [0, 2^32); cost float32 [n] >= 0, budget scalar float32; present bool [n]. An entry is kept if the
    cost of those before it (larger key, or equal key and lower index) is below the budget. The largest threshold whose
    entries reach the budget is found bit by bit: 32 sums over the row instead of a sort.
    """
    cost = tl.where(present, cost, 0.0)
    low = tl.sum(key * 0, 0)  # a scalar int64 zero; every key reaches it
    for bit in tl.static_range(31, -1, -1):
        candidate = low + (1 << bit)
        reached = tl.sum(tl.where(key >= candidate, cost, 0.0), 0)
        low = tl.where(reached >= budget, candidate, low)
    above = key > low
    ties = present & (key == low)
    cost_above = tl.sum(tl.where(above, cost, 0.0), 0)
    tie_cost = tl.where(ties, cost, 0.0)
    cost_before = cost_above + tl.cumsum(tie_cost, 0) - tie_cost
    return present & (above | (ties & (cost_before < budget)))
