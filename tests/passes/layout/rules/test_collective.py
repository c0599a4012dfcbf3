"""Rules of the collectives: shards of all ranks, side by side."""

from __future__ import annotations

import torch

from tests.passes.layout.named_axes import VIDEO, analyse, layouts, spelled

SHARD = ("1", "video:16", "c:6")
JOINT_SHARD = ("1", "video:16|text:4", "c:6")
ops = torch.ops._c10d_functional


def gather(x: torch.Tensor, dim: int, ranks: int = 2) -> torch.Tensor:
    """As torch.distributed's all_gather_tensor does it."""
    whole = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), ranks, "0"))
    return whole if dim == 0 else torch.cat(whole.chunk(ranks, 0), dim)


def exchange(x: torch.Tensor, ranks: int = 2) -> torch.Tensor:
    """All-to-all of the first axis, flat as diffusers does it."""
    parts = [x.numel() // ranks] * ranks
    return ops.wait_tensor(ops.all_to_all_single(x.flatten(), parts, parts, "0")).reshape(x.shape)


def to_heads(x: torch.Tensor) -> torch.Tensor:
    """[1, N / 2, H, D] -> [1, N, H / 2, D], as Ulysses does before attention."""
    b, n, h, d = x.shape
    x = exchange(x.reshape(b, n, 2, h // 2, d).permute(2, 1, 0, 3, 4).contiguous())
    return x.flatten(0, 1).permute(1, 0, 2, 3)


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """[1, N, H / 2, D] -> [1, N / 2, H, D], as Ulysses does after attention."""
    b, n, h, d = x.shape
    x = exchange(x.reshape(b, 2, n // 2, h, d).permute(1, 3, 0, 2, 4).contiguous())
    return x.flatten(0, 1).permute(1, 2, 0, 3)


def test_gathered_shards_are_the_whole_axis() -> None:
    assert layouts(lambda x: gather(x, 1), SHARD) == ("1", "video:32", "c:6")
    assert layouts(lambda x: gather(x, 1), VIDEO) == ("b:2", "video:16", "c:6")
    assert layouts(lambda x: gather(x, 0), VIDEO) == ("b:4", "video:8", "c:6")


def test_gathered_joint_shards_keep_their_order() -> None:
    assert layouts(lambda x: gather(x, 1), JOINT_SHARD) == ("1", "video:16|text:4|video:16|text:4", "c:6")


def test_ulysses_brings_all_tokens_and_takes_them_back() -> None:
    query = ("1", "video:16", "h:4", "d:6")
    assert layouts(to_heads, query) == ("1", "video:32", "h:2", "d:6")
    assert layouts(lambda x: to_tokens(to_heads(x)), query) == ("1", "video:16", "h:4", "d:6")


def test_ulysses_of_joint_shards() -> None:
    query = ("1", "video:16|text:4", "4", "d:6")
    result, mode = analyse(to_heads, query)
    assert spelled(mode.axes_of(result)) == ("1", "2 x video:16|text:4", "2", "d:6")
    assert layouts(lambda x: to_tokens(to_heads(x)), query) == query


def test_unequal_parts_are_unknown() -> None:
    assert layouts(lambda x: ops.all_to_all_single(x, [3, 5], [4, 4], "0"), ("video:8", "c:6")) == ("?", "c:6")


def test_reductions_keep_and_scatter() -> None:
    assert layouts(lambda x: ops.wait_tensor(ops.all_reduce(x, "sum", "0")), SHARD) == SHARD
    assert layouts(lambda x: ops.reduce_scatter_tensor(x, "sum", 2, "0"), ("video:8", "c:6")) == ("video:4", "c:6")
