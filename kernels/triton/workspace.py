"""How much memory the attention kernel's lists may take, and into how many passes that cuts the work. Plain
integers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LOOK_AHEAD", "Workspace", "plan_workspace"]

LOOK_AHEAD = 256  # ids that the kernel may read behind a list: the largest tile of keys
BYTES_PER_ID = 4


@dataclass(frozen=True)
class Workspace:
    """Sizes for one call of block_sparse_attention.

    groups_per_chunk: (batch, query head) groups planned at a time. pool_ids: key ids that the pool holds. capacity: ids
    by which one pass advances. passes: per chunk. bytes: of everything that the call allocates besides its results.
    """

    groups_per_chunk: int
    pool_ids: int
    capacity: int
    passes: int
    bytes: int


def plan_workspace(
    *,
    num_groups: int,
    num_kv_groups: int,
    num_queries: int,
    num_keys: int,
    num_q_blocks: int,
    num_k_blocks: int,
    block_m: int,
    compensate: bool,
    limit_bytes: int,
    mean_bytes: int = 0,
) -> Workspace:
    """Fit the lists of the worst case (every block selected) into ``limit_bytes``.

    mean_bytes: of the clusters' means in the tokens' dtype, which compensation needs besides.
    Raises ValueError where not even one group fits, with the number of MiB that would.
    """
    longest_row = num_keys + (num_k_blocks if compensate else 0)
    # Per row: shifts; its place in working order, lengths of two lists, reserved length, place, tiles and their start,
    # some of them twice for a moment.
    group_bytes = num_q_blocks * (4 * num_k_blocks + 96) + 4 * (num_queries // block_m + num_q_blocks)
    fixed_bytes = 4 * num_kv_groups * num_keys + mean_bytes
    least_pool = 2 * longest_row + LOOK_AHEAD
    least_bytes = fixed_bytes + group_bytes + BYTES_PER_ID * least_pool
    if least_bytes > limit_bytes:
        raise ValueError(
            f"svg2::block_sparse_attention: workspace_mb is {limit_bytes / 2**20:.0f}; valid here: at least "
            f"{-(-least_bytes // 2**20)} (lists for {num_keys} keys, {num_q_blocks} by {num_k_blocks} blocks)"
        )
    for_groups = max((limit_bytes - fixed_bytes) // 4, group_bytes)
    groups = max(1, min(num_groups, for_groups // group_bytes))
    worst_total = groups * min(num_q_blocks, num_queries) * longest_row
    affordable = (limit_bytes - fixed_bytes - groups * group_bytes) // BYTES_PER_ID
    pool_ids = min(max(affordable, least_pool), worst_total + longest_row + LOOK_AHEAD)
    # A row begins inside a pass's stretch and may end beyond it; the kernel also looks one tile ahead.
    capacity = pool_ids - longest_row - LOOK_AHEAD
    passes = max(1, -(-worst_total // capacity))
    total = fixed_bytes + groups * group_bytes + BYTES_PER_ID * pool_ids
    return Workspace(groups, pool_ids, capacity, passes, total)
