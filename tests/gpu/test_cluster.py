"""k-means, ordering, permutation and means in Triton against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from tests.gpu.support import poisoned, sized, token_major, tokens
from tests.kernels.helpers import random_offsets

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_TOKENS = sized(3001, 150)


def flag(value: bool, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def check_kmeans(
    x: Tensor, num_clusters: int, iters: int, device: torch.device, start: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:  # fmt: skip
    """x [B, H, N, D] on the CPU. Labels are nearest centroids up to rounding; centroids and sizes follow from the
    labels."""
    given = torch.zeros(*x.shape[:2], num_clusters, x.shape[3]) if start is None else start
    mask = None if valid is None else valid.to(device)
    args = (x.to(device), given.to(device), flag(start is not None, device))
    labels, centroids, sizes = (t.cpu() for t in poisoned(device, ops.kmeans, *args, iters, mask))
    members = torch.ones(x.shape[:3], dtype=torch.bool) if valid is None else valid.expand(x.shape[:3])
    assert labels.dtype == torch.int32 and bool(((labels >= 0) & (labels < num_clusters)).all())
    counted = torch.zeros_like(sizes).scatter_add_(2, labels.long(), members.to(torch.int32))
    assert torch.equal(sizes, counted)
    sums = torch.zeros(centroids.shape, dtype=torch.float64).scatter_add_(
        2, labels.long().unsqueeze(-1).expand(x.shape), torch.where(members.unsqueeze(-1), x.double(), 0.0)
    )
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    filled = (sizes > 0).unsqueeze(-1)
    difference = torch.where(filled, centroids - means, 0.0)
    assert float(difference.abs().max()) <= 1e-5 * float(x.double().nan_to_num().abs().max())
    if iters == 1 and start is None:
        return
    before = given if iters == 1 else ops.kmeans(*args, iters - 1, mask)[1].cpu()
    assert torch.equal(torch.where(filled, 0, centroids), torch.where(filled, 0, before))
    # Centroids are read in the tokens' dtype.
    distance = torch.cdist(x.double(), before.to(x.dtype).double())
    chosen = distance.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    excess = (chosen - distance.amin(dim=-1))[members]
    assert float(excess.max()) <= 2e-3 * float(distance[members].max())


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assignment_and_update(dtype: torch.dtype, iters: int, seeded: bool, device: torch.device) -> None:
    x = tokens(NUM_TOKENS, 64).to(dtype)
    start = torch.randn(1, 2, 37, 64, generator=torch.Generator().manual_seed(3)) if seeded else None
    check_kmeans(x, 37, iters, device, start)


@pytest.mark.parametrize("head_dim", [32, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    check_kmeans(tokens(NUM_TOKENS, head_dim).to(dtype), 20, 2, device)


@pytest.mark.parametrize(
    ("num_tokens", "num_clusters"), [(1, 1), (65, 65), (130, 40), (NUM_TOKENS, 1), (sized(9000, 300), sized(1000, 70))]
)
def test_sizes(num_tokens: int, num_clusters: int, device: torch.device) -> None:
    check_kmeans(tokens(num_tokens, 32, heads=1).bfloat16(), num_clusters, 2, device)


@pytest.mark.parametrize("mask_heads", [1, 2])
def test_masked_tokens_carry_no_mass_and_seed_nothing(mask_heads: int, device: torch.device) -> None:
    x = tokens(NUM_TOKENS, 48, batch=2)
    valid = torch.rand(2, mask_heads, NUM_TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
    x[~valid.expand(2, 2, NUM_TOKENS)] = math.nan
    args = (x.to(device), torch.zeros(2, 2, 12, 48, device=device), flag(False, device), 1, valid.to(device))
    labels, centroids, sizes = (t.cpu() for t in poisoned(device, ops.kmeans, *args))
    seeds = torch.zeros(2, 2, 12, 48)
    expected = reference.kmeans(torch.nan_to_num(x), seeds, torch.tensor(False), 1, valid, compute_dtype=torch.float64)
    # Seeds are tokens, so all centres are clear and one iteration agrees but for ties.
    members = valid.expand(2, 2, NUM_TOKENS)
    assert float((labels == expected[0])[members].float().mean()) > 0.99
    assert torch.equal(sizes.sum(dim=-1), members.sum(dim=-1).to(torch.int32))
    assert bool(centroids.isfinite().all())


def test_empty_clusters_keep_their_centroids_and_far_scales_work(device: torch.device) -> None:
    for scale in (1e-3, 1.0, 16.0):
        x = (scale * tokens(NUM_TOKENS, 32)).bfloat16()
        start = torch.cat([scale * torch.randn(1, 2, 5, 32), torch.full((1, 2, 4, 32), 1e4)], dim=2)
        check_kmeans(x, 9, 2, device, start)


def test_a_broken_centroid_is_chosen_by_nobody(device: torch.device) -> None:
    x = tokens(NUM_TOKENS, 32).bfloat16()
    start = torch.randn(1, 2, 6, 32)
    start[:, :, 2, 0], start[:, :, 4, 1] = math.nan, math.inf
    args = (x.to(device), start.to(device), flag(True, device), 1)
    labels, _, sizes = poisoned(device, ops.kmeans, *args)
    assert not bool(((labels == 2) | (labels == 4)).any()) and not bool(sizes[..., [2, 4]].any())


def test_token_major_input_gives_the_same(device: torch.device) -> None:
    x = tokens(NUM_TOKENS, 64, batch=2).bfloat16().to(device)
    given = torch.zeros(2, 2, 20, 64, device=device)
    expected = ops.kmeans(x, given, flag(False, device), 2)
    actual = poisoned(device, ops.kmeans, token_major(x), given, flag(False, device), 2)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# ------------------------------------------------------------------------------------------------ order, permute, means


@pytest.mark.parametrize(
    ("video", "before", "after", "num_clusters"),
    [(NUM_TOKENS, 0, 0, 37), (NUM_TOKENS, 7, 11, 1000), (1, 0, 0, 1), (64, 0, 5, 2), (NUM_TOKENS, 3, 0, 1)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_order_is_the_oracle_s(
    video: int, before: int, after: int, num_clusters: int, masked: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_clusters, (2, 3, video), generator=generator, dtype=torch.int32)
    labels[0, 0] = num_clusters // 2  # one giant cluster, all others empty
    total = before + video + after
    valid = torch.rand(2, 1, total, generator=generator) < 0.8 if masked else None
    expected = reference.cluster_order(labels, num_clusters, before, total, valid)
    mask = None if valid is None else valid.to(device)
    actual = poisoned(device, ops.cluster_order, labels.to(device), num_clusters, before, total, mask)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("head_dim", [1, 32, 72, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permutation_is_exact_and_undone(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    x = torch.randn(2, 3, NUM_TOKENS, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = torch.rand(2, 3, NUM_TOKENS, generator=torch.Generator().manual_seed(1)).argsort(dim=-1).to(torch.int32)
    for layout in (x.to(device), token_major(x.to(device))):
        permuted = poisoned(device, ops.permute_tokens, layout, order.to(device))
        assert torch.equal(permuted.cpu(), reference.permute_tokens(x, order)) and permuted.is_contiguous()
        back = poisoned(device, ops.unpermute_tokens, permuted, order.to(device))
        assert torch.equal(back.cpu(), x) and back.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_means_are_the_oracle_s(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 2, NUM_TOKENS, head_dim, generator=generator)).to(dtype)
    offsets = random_offsets(generator, 2, 2, 30, NUM_TOKENS)
    actual = poisoned(device, ops.cluster_means, x.to(device), offsets.to(device)).cpu()
    expected = reference.cluster_means(x, offsets, compute_dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
