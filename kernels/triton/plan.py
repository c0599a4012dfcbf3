"""From a block map to work for the attention kernel: lists of key ids, cut into passes that fit a bounded pool.

Every query block (a **row**) gets one list with the ids of all keys that it attends to, so that the attention kernel
gathers full tiles of keys whatever the clusters' sizes. Behind it, with compensation, follows the list of the clusters
that it skips. How long the lists are is known to the device only. So the pool has a fixed size, the lists get their
places in one endless line, and the line is cut into **passes** of the pool's capacity: a pass writes the lists that
begin in its stretch (``write_lists``) and attends to them. There are as many passes as the worst case needs; at the
usual density most of them find no row and end at once. Nothing is read back to the host.

Rows of a head are taken longest first: with one budget for all heads some have several times as many keys as others,
and what is drawn last should be short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import num_processors
from svg2_compile.kernels.triton.primitives import kv_group_of
from svg2_compile.kernels.triton.workspace import Workspace

__all__ = ["AttentionPlan", "Blocks", "label_keys", "plan_rows", "row_key_counts", "write_lists"]

BLOCKS_PER_STEP = 1024
POSITIONS_PER_STEP = 1024
# Integers that no address alignment depends on: one compiled kernel serves all their values.
COUNTS = ["this_pass", "capacity", "first_group", "num_rows", "num_blocks", "num_keys"]
# What a block that is not in a row's list has instead of a shift.
SKIPPED = tl.constexpr(-2147483648)  # a cluster with keys that the row did not select
NOTHING = tl.constexpr(-2147483647)  # no keys, or no cluster


class Blocks(NamedTuple):
    """Which blocks attend to which: contiguous q_offsets int32 [B, Hq, Rq + 1], k_offsets int32 [B, Hkv, Rk + 1],
    block_map int8 [B, Hq, Rq, Rk]."""

    q_offsets: Tensor
    k_offsets: Tensor
    block_map: Tensor

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, key/value heads."""
        return self.block_map.shape[1], self.k_offsets.shape[1]


class AttentionPlan(NamedTuple):
    """Device tensors of one chunk of groups; S = groups * Rq slots, one per row, in working order.

    rows int32 [S]: the row, of its group, that a slot is about.
    shift int32 [S, Rk]: added to a key's position it gives the key's place in the row's list; or SKIPPED or NOTHING.
    key_counts, skipped_counts int32 [S]: lengths of the two lists. places int64 [S + 1]: where a row's lists begin.
    tile_starts int32 [S + 1]: query tiles before this row's. tile_slots int32: the slot of every tile. pass_slots int64
    [passes + 1]: the first slot of every pass.
    """

    rows: Tensor
    shift: Tensor
    key_counts: Tensor
    skipped_counts: Tensor
    places: Tensor
    tile_starts: Tensor
    tile_slots: Tensor
    pass_slots: Tensor


@triton.jit(do_not_specialize=["first_group", "num_rows", "num_blocks"])
def _measure_rows(
    block_map, q_offsets, k_offsets, rows, shift, key_counts, skipped_counts, reserved, tiles,
    first_group, num_q_heads, num_kv_heads, num_rows, num_blocks,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, COMPENSATE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Lengths of one row's lists and where each of its key blocks goes in them. Unless PLAN only key_counts, of the
    rows in their own order."""
    slot = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    row = tl.program_id(0)
    if PLAN:
        row = tl.load(rows + slot)
    group = tl.program_id(1).to(tl.int64) + first_group
    kv_group = kv_group_of(group, num_q_heads, num_kv_heads)
    k_offsets += kv_group * (num_blocks + 1)
    block_map += (group * num_rows + row) * num_blocks
    length = tl.sum(tl.zeros([BLOCK], tl.int32), 0)
    skipped = length
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        present = block < num_blocks
        begin = tl.load(k_offsets + block, mask=present, other=0)
        size = tl.load(k_offsets + block + 1, mask=present, other=0) - begin
        selected = tl.load(block_map + block, mask=present, other=0) != 0
        kept = tl.where(selected, size, 0)
        if PLAN:
            place = length + tl.cumsum(kept, 0) - kept
            # Only clusters are compensated: the last two blocks are context and null.
            skips = (size > 0) & ~selected & (block < num_blocks - 2)
            shifted = tl.where(skips, SKIPPED, tl.where(kept > 0, place - begin, NOTHING))
            tl.store(shift + slot * num_blocks + block, shifted, mask=present)
            skipped += tl.sum(skips.to(tl.int32), 0)
        length += tl.sum(kept, 0)
    tl.store(key_counts + slot, length)
    if PLAN:
        q_boundary = q_offsets + group * (num_rows + 1) + row
        num_queries = tl.load(q_boundary + 1) - tl.load(q_boundary)
        room = length
        tl.store(skipped_counts + slot, skipped)
        if COMPENSATE:
            room += skipped
        tl.store(reserved + slot, tl.where(num_queries > 0, room, 0))
        tl.store(tiles + slot, (num_queries + BLOCK_M - 1) // BLOCK_M)


@triton.jit(do_not_specialize=["num_blocks", "num_keys"])
def _label_keys(k_offsets, block_of_key, num_blocks, num_keys, STEP: tl.constexpr):
    """block_of_key of the keys of one block."""
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    boundary = k_offsets + group * (num_blocks + 1) + block
    begin, end = tl.load(boundary), tl.load(boundary + 1)
    for first in range(begin, end, STEP):
        key = first + tl.arange(0, STEP)
        tl.store(block_of_key + group * num_keys + key, tl.zeros([STEP], tl.int32) + block, mask=key < end)


@triton.jit
def _list_tiles(tile_starts, tile_slots, STEP: tl.constexpr):
    """tile_slots of the tiles of one row."""
    slot = tl.program_id(0)
    begin, end = tl.load(tile_starts + slot), tl.load(tile_starts + slot + 1)
    for first in range(begin, end, STEP):
        tile = first + tl.arange(0, STEP)
        tl.store(tile_slots + tile, tl.zeros([STEP], tl.int32) + slot, mask=tile < end)


@triton.jit(do_not_specialize=COUNTS)
def _write_lists(
    shift, key_counts, places, pass_slots, block_of_key, k_order, pool, this_pass, capacity,
    first_group, num_q_heads, num_kv_heads, num_rows, num_blocks, num_keys,
    STEP: tl.constexpr, HAS_ORDER: tl.constexpr, COMPENSATE: tl.constexpr,
):  # fmt: skip
    """Write the lists of the rows of one pass into the pool; every program takes a row at a time."""
    last = tl.load(pass_slots + this_pass + 1)
    for slot in range(tl.load(pass_slots + this_pass) + tl.program_id(0), last, tl.num_programs(0)):
        place = tl.load(places + slot)
        if tl.load(places + slot + 1) > place:
            kv_group = kv_group_of(slot // num_rows + first_group, num_q_heads, num_kv_heads)
            ids = pool + (place - this_pass.to(tl.int64) * capacity)
            length = tl.load(key_counts + slot)
            row_shift = shift + slot * num_blocks
            for first in range(0, num_keys, STEP):
                key = first + tl.arange(0, STEP)
                present = key < num_keys
                block = tl.load(block_of_key + kv_group * num_keys + key, mask=present, other=0)
                offset = tl.load(row_shift + block, mask=present, other=NOTHING)
                if HAS_ORDER:
                    token = tl.load(k_order + kv_group * num_keys + key, mask=present, other=0)
                else:
                    token = key
                tl.store(ids + key + offset, token, mask=present & (offset > NOTHING))
            if COMPENSATE:
                seen = length * 0
                for first in range(0, num_blocks, STEP):
                    block = first + tl.arange(0, STEP)
                    skips = tl.load(row_shift + block, mask=block < num_blocks, other=NOTHING) == SKIPPED
                    count = skips.to(tl.int32)
                    tl.store(ids + length + seen + tl.cumsum(count, 0) - count, block, mask=skips)
                    seen += tl.sum(count, 0)


def _measure(
    blocks: Blocks, groups: slice, outputs: tuple[Tensor, ...], block_m: int, compensate: bool, plan: bool
) -> None:
    num_rows, num_k_blocks = blocks.block_map.shape[2:]
    _measure_rows[num_rows, groups.stop - groups.start](
        *(blocks.block_map, blocks.q_offsets, blocks.k_offsets, *outputs),
        *(groups.start, *blocks.heads, num_rows, num_k_blocks),
        **{"BLOCK": min(triton.next_power_of_2(num_k_blocks), BLOCKS_PER_STEP), "BLOCK_M": block_m},
        **{"COMPENSATE": compensate, "PLAN": plan, "num_warps": 4},
    )


def row_key_counts(blocks: Blocks, groups: slice) -> Tensor:
    """Keys that every query block of some groups attends to: int32 [groups, Rq]."""
    counts = blocks.q_offsets.new_empty(groups.stop - groups.start, blocks.block_map.shape[2])
    unused = (blocks.q_offsets,)
    _measure(blocks, groups, (*unused * 2, counts, *unused * 3), 16, False, plan=False)
    return counts


def label_keys(k_offsets: Tensor, num_keys: int) -> Tensor:
    """Block of every permuted key: int32 [B, Hkv, Nk]."""
    batch, kv_heads, boundaries = k_offsets.shape
    labels = k_offsets.new_empty(batch, kv_heads, num_keys)
    if labels.numel() > 0:
        _label_keys[boundaries - 1, batch * kv_heads](
            k_offsets, labels, boundaries - 1, num_keys, STEP=128, num_warps=4
        )
    return labels


def plan_rows(
    blocks: Blocks, groups: slice, num_queries: int, block_m: int, compensate: bool, space: Workspace
) -> AttentionPlan:
    """Measure the rows of some groups and give every list its place and every query tile its row."""
    num_rows, num_k_blocks = blocks.block_map.shape[2:]
    num_groups = groups.stop - groups.start
    slots = num_groups * num_rows
    new = blocks.q_offsets.new_empty
    shift, key_counts, skipped_counts, tiles = new(slots, num_k_blocks), new(slots), new(slots), new(slots)
    reserved = new(slots, dtype=torch.int64)
    rows = row_key_counts(blocks, groups).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    outputs = (rows, shift, key_counts, skipped_counts, reserved, tiles)
    _measure(blocks, groups, outputs, block_m, compensate, plan=True)
    places = torch.nn.functional.pad(reserved.cumsum(0), (1, 0))
    tile_starts = torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    tile_slots = new(num_groups * (num_rows + num_queries // block_m))
    _list_tiles[(slots,)](tile_starts, tile_slots, STEP=64, num_warps=1)
    boundaries = torch.arange(space.passes, device=places.device) * space.capacity
    pass_slots = torch.searchsorted(places.narrow(0, 0, slots), boundaries)
    # The last pass takes all that is left, rows without keys at the very end as well.
    pass_slots = torch.nn.functional.pad(pass_slots, (0, 1), value=slots)
    return AttentionPlan(rows, shift, key_counts, skipped_counts, places, tile_starts, tile_slots, pass_slots)


def write_lists(
    plan: AttentionPlan,
    blocks: Blocks,
    place: tuple[int, int, int],
    block_of_key: Tensor,
    k_order: Tensor | None,
    pool: Tensor,
    compensate: bool,
) -> None:
    """Fill the pool with the lists of one pass; place: the pass, its capacity, the first group of the chunk."""
    num_rows, num_k_blocks = blocks.block_map.shape[2:]
    _write_lists[(8 * num_processors(pool.device),)](
        *(plan.shift, plan.key_counts, plan.places, plan.pass_slots, block_of_key),
        *(block_of_key if k_order is None else k_order, pool, *place),
        *(*blocks.heads, num_rows, num_k_blocks, block_of_key.shape[2]),
        **{"STEP": POSITIONS_PER_STEP, "HAS_ORDER": k_order is not None, "COMPENSATE": compensate, "num_warps": 4},
    )
