"""What the kernels take of the device's memory, the passes that a small workspace forces, and 64-bit addressing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import ops
from tests.gpu.support import moved, poison_free_memory, poisoned, sized
from tests.kernels.helpers import Problem, make_problem

# The allocator rounds every tensor up, and keeps remainders of large blocks with the tensor.
ROUNDING_MIB = 2


def problem(keep: float = 0.3) -> Problem:
    return make_problem(
        q_heads=sized(8, 2),
        kv_heads=sized(8, 2),
        num_queries=sized(6000, 70),
        num_keys=sized(6000, 90),
        num_q_clusters=sized(30, 4),
        num_k_clusters=sized(100, 9),
        head_dim=sized(128, 16),
        dtype=torch.bfloat16,
        keep=keep,
    )


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("workspace_mb", [1, 4, 16, 256])
def test_the_workspace_is_bounded(workspace_mb: int, compensation: bool, cuda: torch.device) -> None:
    given = problem(keep=1.1)  # the longest lists
    args = moved(given.args(compensation), cuda)
    ops.block_sparse_attention(*args, workspace_mb=workspace_mb)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = ops.block_sparse_attention(*args, workspace_mb=workspace_mb)
    growth = torch.cuda.max_memory_allocated() - before
    # Compensation reads copies of the means in the tokens' dtype.
    means = 2 * (given.k_centroids.numel() + given.v_centroids.numel()) if compensation else 0
    allowed = sum(result.nbytes for result in results) + means + ((workspace_mb + ROUNDING_MIB) << 20)
    assert growth <= allowed, f"{growth / 2**20:.2f} MiB, of {allowed / 2**20:.2f}"


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("keep", [0.1, 1.1])
@pytest.mark.parametrize("compensation", [False, True])
def test_many_passes_give_the_bits_of_one(compensation: bool, keep: float, orders: bool, device: torch.device) -> None:
    given = problem(keep)
    args = moved(given.args(compensation), device)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {}
    if orders:
        shapes = {"q_order": given.query.shape[:3], "k_order": given.key.shape[:3]}
        options = {name: torch.rand(shape, generator=generator).argsort(-1).int() for name, shape in shapes.items()}
        options = {name: order.to(device) for name, order in options.items()}
    single = ops.block_sparse_attention(*args, **options, workspace_mb=1024)
    for workspace_mb in (1, 2, 7):
        many = poisoned(device, ops.block_sparse_attention, *args, **options, workspace_mb=workspace_mb)
        assert all(torch.equal(a, b) for a, b in zip(single, many, strict=True))


def test_too_little_workspace_says_how_much_is_needed(device: torch.device) -> None:
    given = make_problem(num_queries=8, num_keys=200_000, head_dim=16, q_heads=1, kv_heads=1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"workspace_mb is 1; valid here: at least \d+"):
        ops.block_sparse_attention(*moved(given.args(), device), workspace_mb=1)


# --------------------------------------------------------------------------------------------- more than 2^31 elements

NUM_TOKENS, HEADS, WIDTH = sized(33_000, 130), sized(512, 3), sized(128, 16)
CLUSTERS = 4


@pytest.fixture
def enormous(device: torch.device) -> Tensor:
    """x [1, H, N, D] token-major with more than 2^31 elements: rows of one head lie beyond 32-bit offsets, too."""
    if device.type == "cuda":
        needed = 8 * NUM_TOKENS * HEADS * WIDTH * 2
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed >> 30} GiB of free device memory")
        assert NUM_TOKENS * HEADS * WIDTH > 1 << 31
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.empty(1, NUM_TOKENS, HEADS, WIDTH, dtype=torch.bfloat16, device=device)
    return x.normal_(generator=generator).transpose(1, 2)


def ends(x: Tensor) -> Tensor:
    """The first and the last head, on their own."""
    return x[:, [0, -1]].contiguous()


@pytest.mark.slow
def test_clustering_addresses_64_bits(enormous: Tensor, device: torch.device) -> None:
    x = enormous
    given = torch.zeros(1, HEADS, CLUSTERS, WIDTH, device=device)
    unseeded = torch.tensor(False, device=device)
    labels, centroids, sizes = poisoned(device, ops.kmeans, x, given, unseeded, 2)
    alone = ops.kmeans(ends(x), ends(given), unseeded, 2)
    for all_heads, few in zip((labels, centroids, sizes), alone, strict=True):
        assert torch.equal(ends(all_heads), few)
    order, offsets = ops.cluster_order(labels, CLUSTERS, 0, NUM_TOKENS)
    order_alone, offsets_alone = ops.cluster_order(ends(labels), CLUSTERS, 0, NUM_TOKENS)
    assert torch.equal(ends(order), order_alone) and torch.equal(ends(offsets), offsets_alone)
    permuted = poisoned(device, ops.permute_tokens, x, order)
    assert torch.equal(ends(permuted), ops.permute_tokens(ends(x), order_alone))
    means = ops.cluster_means(permuted, offsets)
    assert torch.equal(ends(means), ops.cluster_means(ends(permuted), offsets_alone))
    back = poisoned(device, ops.unpermute_tokens, permuted, order)
    del permuted
    assert torch.equal(ends(back), ends(x)) and torch.equal(back[:, :, -1], x[:, :, -1])


@pytest.mark.slow
@pytest.mark.parametrize("permuted", [False, True])
def test_attention_addresses_64_bits(permuted: bool, enormous: Tensor, device: torch.device) -> None:
    """Every query block sees one small block of keys at the end of the sequence, and the context."""
    x = enormous.contiguous() if permuted else enormous
    bounds = [0, NUM_TOKENS // 3, NUM_TOKENS // 2, NUM_TOKENS - 70, NUM_TOKENS - 6, NUM_TOKENS, NUM_TOKENS]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device).expand(1, HEADS, -1).contiguous()
    block_map = torch.zeros(1, HEADS, CLUSTERS + 2, CLUSTERS + 2, dtype=torch.bool, device=device)
    block_map[..., 3:5] = True
    order = None
    if not permuted:
        order = torch.arange(NUM_TOKENS - 1, -1, -1, dtype=torch.int32, device=device).expand(1, HEADS, -1).contiguous()
    poison_free_memory(device)
    out, lse = ops.block_sparse_attention(x, x, x, offsets, offsets, block_map, WIDTH**-0.5, None, None, order, order)
    few = None if order is None else ends(order)
    alone = ops.block_sparse_attention(
        *(ends(x),) * 3, ends(offsets), ends(offsets), ends(block_map), WIDTH**-0.5, None, None, few, few
    )
    assert torch.equal(ends(out), alone[0]) and torch.equal(ends(lse), alone[1])
    assert bool(out[:, :, -1].isfinite().all()) and bool(lse.isfinite().all())
