"""The position-blocked baseline: its blocks, and the whole compiled path over them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.quality.position import KINDS, position_blocks, position_labels
from svg2_compile.kernels import dispatch, ops
from svg2_compile.kernels.reference import implementation as reference

GRIDS = [((4, 6, 8), 2), ((4, 6, 8), 13), ((16, 16, 16), 54), ((21, 8, 5), 40), ((1, 1, 7), 7), ((3, 2, 2), 11)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "num_blocks"), GRIDS)
def test_blocks_partition_the_tokens_evenly(kind: str, grid: tuple[int, int, int], num_blocks: int) -> None:
    num_tokens = math.prod(grid)
    labels = position_labels(kind, grid, num_tokens, num_blocks)
    assert labels.dtype == torch.int32 and labels.shape == (num_tokens,)
    sizes = torch.bincount(labels.long(), minlength=num_blocks)
    assert sizes.shape == (num_blocks,) and int(sizes.min()) >= 1
    if kind == "raster":
        assert int(sizes.max() - sizes.min()) <= 1
        assert bool((labels.diff() >= 0).all())
    else:
        assert int(sizes.max()) <= 2 * max(num_tokens / num_blocks, 1.0)
        for block in range(num_blocks):  # a box is full: as many tokens as its bounding box
            where = (labels.view(grid) == block).nonzero()
            extent = where.max(dim=0).values - where.min(dim=0).values + 1
            assert int(extent.prod()) == where.shape[0]


def test_tiles_are_compact() -> None:
    labels = position_labels("tiles", (16, 16, 16), 4096, 64).view(16, 16, 16)
    assert bool((labels[:4, :4, :4] == labels[0, 0, 0]).all())
    assert int((labels == labels[0, 0, 0]).sum()) == 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_clusters_have_exact_means_and_sizes(kind: str, masked: bool) -> None:
    torch.manual_seed(0)
    x, start = torch.randn(2, 3, 60, 5), torch.randn(2, 3, 7, 5)
    valid = torch.rand(2, 1, 60) > 0.3 if masked else None
    with position_blocks(kind, (3, 4, 5)):
        labels, centroids, sizes = ops.kmeans(x, start, torch.tensor(True), 4, valid)
    expected = position_labels(kind, (3, 4, 5), 60, 7)
    assert torch.equal(labels, expected.expand(2, 3, 60))
    for b in range(2):
        for block in range(7):
            members = (expected == block) & (True if valid is None else valid[b, 0])
            assert sizes[b, :, block].tolist() == [int(members.sum())] * 3
            torch.testing.assert_close(centroids[b, :, block], x[b][:, members].mean(dim=1))


def test_table_is_restored_also_after_errors_and_when_nested() -> None:
    x, start = torch.randn(1, 1, 8, 2), torch.zeros(1, 1, 2, 2)
    before, default = dict(dispatch.IMPLEMENTATIONS), dispatch.implementation_for(torch.device("cpu"))
    with position_blocks("raster", (2, 2, 2)):
        with position_blocks("tiles", (8, 1, 1)):
            assert dispatch.implementation_for(x.device) == "position"
        assert ops.kmeans(x, start, torch.tensor(False), 1)[0].tolist() == [[[0, 0, 0, 0, 1, 1, 1, 1]]]
    with pytest.raises(ValueError, match="27 tokens; given 8"), position_blocks("raster", (3, 3, 3)):
        ops.kmeans(x, start, torch.tensor(False), 1)
    assert before == dispatch.IMPLEMENTATIONS
    assert dispatch.implementation_for(x.device) == default


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="kind is 'hexagons'"), position_blocks("hexagons", (1, 1, 1)):
        pass
    with pytest.raises(ValueError, match="at least 1"), position_blocks("tiles", (1, 0, 1)):
        pass


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_compiled_graphs_use_the_blocks_at_run_time() -> None:
    """One compiled graph, three labellings: which one holds is decided when it runs."""
    torch.manual_seed(0)
    model, grid = _SelfAttention().eval(), (4, 8, 8)
    options: dict[str, Any] = {
        "density": 0.3,
        "compensation": "none",
        "min_tokens": 0,
        "dense_steps": 0,
        "dense_layers": 0,
        "inner_backend": "eager",
    }
    clusters = {"num_q_clusters": 4, "num_k_clusters": 9}
    x = torch.randn(2, 256, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg2", options={**options, **clusters})
        semantic = compiled(x)
        for kind in KINDS:
            with position_blocks(kind, grid):
                blocked = compiled(x)
            torch.testing.assert_close(blocked, x + _by_hand(model, x, kind, grid))
            assert not torch.allclose(blocked, semantic)


def _by_hand(model: _SelfAttention, x: Tensor, kind: str, grid: tuple[int, int, int]) -> Tensor:
    """The same attention by the readable reference, from labels and means made here."""
    q, k, v = model.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    def blocks(tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels = position_labels(kind, grid, 256, count).expand(2, 2, 256)
        order, offsets = reference.cluster_order(labels, count, 0, 256)
        means = reference.cluster_means(reference.permute_tokens(tokens, order), offsets)
        return order, offsets, means, offsets.diff(dim=-1)[..., :count]

    q_order, q_offsets, q_means, q_sizes = blocks(q, 4)
    k_order, k_offsets, k_means, k_sizes = blocks(k, 9)
    block_map = reference.select_blocks(q_means, k_means, q_sizes, k_sizes, 8**-0.5, 0.9, 0.0, 0.3)
    out, _ = reference.block_sparse_attention(
        q, k, v, q_offsets, k_offsets, block_map, 8**-0.5, q_order=q_order, k_order=k_order
    )
    return out.transpose(1, 2).flatten(2)
