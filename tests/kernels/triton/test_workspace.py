"""The workspace of the attention kernel: within its limit, and never too few passes for the worst case."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.triton.workspace import LOOK_AHEAD, plan_workspace

WAN_14B_720P = {
    "num_groups": 40,
    "num_kv_groups": 40,
    "num_queries": 75_600,
    "num_keys": 75_600,
    "num_q_blocks": 302,
    "num_k_blocks": 1002,
    "block_m": 128,
}


@pytest.mark.parametrize("compensate", [False, True])
def test_wan_fits_into_the_default_limit(compensate: bool) -> None:
    space = plan_workspace(**WAN_14B_720P, compensate=compensate, limit_bytes=256 << 20)
    assert space.bytes <= 256 << 20
    assert space.groups_per_chunk == 40
    # 25 % of all keys, as the published density, takes a quarter of the worst case's passes.
    assert space.passes <= 24


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 100),
    num_queries=st.integers(1, 200_000),
    num_keys=st.integers(1, 200_000),
    blocks=st.tuples(st.integers(3, 800), st.integers(3, 2000)),
    compensate=st.booleans(),
    limit_mb=st.integers(1, 1024),
)
def test_every_list_of_the_worst_case_has_a_place(
    groups: int, num_queries: int, num_keys: int, blocks: tuple[int, int], compensate: bool, limit_mb: int
) -> None:
    sizes = {"num_groups": groups, "num_kv_groups": groups, "num_queries": num_queries, "num_keys": num_keys}
    sizes |= {"num_q_blocks": blocks[0], "num_k_blocks": blocks[1], "block_m": 128}
    try:
        space = plan_workspace(**sizes, compensate=compensate, limit_bytes=limit_mb << 20)
    except ValueError as error:
        message = str(error)
        needed = int(message.split(f"workspace_mb is {limit_mb}; valid here: at least ")[1].split()[0])
        plan_workspace(**sizes, compensate=compensate, limit_bytes=needed << 20)
        # The message names the least that works: a MiB less does not.
        with pytest.raises(ValueError, match=f"at least {needed} "):
            plan_workspace(**sizes, compensate=compensate, limit_bytes=(needed - 1) << 20)
        return
    longest = num_keys + (blocks[1] if compensate else 0)
    rows = min(blocks[0], num_queries)
    assert space.bytes <= limit_mb << 20
    assert 1 <= space.groups_per_chunk <= groups
    assert space.passes * space.capacity >= space.groups_per_chunk * rows * longest
    # A list that begins at the end of a pass's stretch, and the look-ahead behind it, stay inside the pool.
    assert space.capacity - 1 + longest + LOOK_AHEAD <= space.pool_ids


def test_small_problems_take_little() -> None:
    space = plan_workspace(
        num_groups=2, num_kv_groups=2, num_queries=300, num_keys=300, num_q_blocks=4, num_k_blocks=6, block_m=64,
        compensate=False, limit_bytes=256 << 20,
    )  # fmt: skip
    assert space.passes == 1
    assert space.bytes < 1 << 16
