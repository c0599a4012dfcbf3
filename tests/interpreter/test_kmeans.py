"""k-means, ordering, permutation and means in Triton against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.triton import implementation
from tests.kernels.helpers import random_offsets

COLD, WARM = torch.tensor(False), torch.tensor(True)


def clustered(num_tokens: int, head_dim: int, *, batch: int = 1, heads: int = 2, seed: int = 0) -> Tensor:
    """Tokens around a few centres, as keys are: nearest centroids are clear."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(batch, heads, 7, head_dim, generator=generator)
    topic = torch.randint(0, 7, (num_tokens,), generator=generator)
    return centres[:, :, topic] + 0.5 * torch.randn(batch, heads, num_tokens, head_dim, generator=generator)


def check_kmeans(x: Tensor, num_clusters: int, iters: int, start: Tensor | None, valid: Tensor | None = None) -> None:
    """Labels are nearest centroids up to rounding; centroids and sizes follow from the labels exactly."""
    given = torch.zeros(*x.shape[:2], num_clusters, x.shape[3]) if start is None else start
    seeded = COLD if start is None else WARM
    labels, centroids, sizes = implementation.kmeans(x, given, seeded, iters, valid)
    members = torch.ones(x.shape[:3], dtype=torch.bool) if valid is None else valid.expand(x.shape[:3])
    assert labels.dtype == torch.int32 and bool(((labels >= 0) & (labels < num_clusters)).all())
    counted = torch.zeros_like(sizes).scatter_add_(2, labels.long(), members.to(torch.int32))
    assert torch.equal(sizes, counted)
    expected = reference.kmeans(x, given, seeded, iters, valid)
    before = given if start is not None and iters == 1 else None
    if iters > 1:
        before = implementation.kmeans(x, given, seeded, iters - 1, valid)[1]
    sums = torch.zeros_like(centroids).scatter_add_(
        2, labels.long().unsqueeze(-1).expand(x.shape), torch.where(members.unsqueeze(-1), x.float(), 0.0)
    )
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    filled = (sizes > 0).unsqueeze(-1)
    torch.testing.assert_close(torch.where(filled, centroids, 0), torch.where(filled, means, 0), rtol=1e-5, atol=1e-5)
    if before is not None:
        assert torch.equal(torch.where(filled, 0, centroids), torch.where(filled, 0, before))
        distance = torch.cdist(x.double(), before.to(x.dtype).double())
        chosen = distance.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
        excess = (chosen - distance.amin(dim=-1))[members]
        assert float(excess.max()) <= 2e-3 * float(distance.max())
    if x.dtype == torch.float32:
        assert float((labels == expected[0])[members].float().mean()) > 0.99


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_assignment_and_update(dtype: torch.dtype, iters: int, seeded: bool) -> None:
    x = clustered(150, 20).to(dtype)
    start = torch.randn(1, 2, 9, 20, generator=torch.Generator().manual_seed(3)) if seeded else None
    check_kmeans(x, 9, iters, start)


@pytest.mark.parametrize(
    ("num_tokens", "num_clusters", "head_dim"), [(1, 1, 1), (65, 65, 8), (130, 40, 33), (600, 3, 16)]
)
def test_odd_sizes(num_tokens: int, num_clusters: int, head_dim: int) -> None:
    check_kmeans(clustered(num_tokens, head_dim, heads=1), num_clusters, 2, None)


def test_masked_tokens_carry_no_mass_and_seed_nothing() -> None:
    x = clustered(140, 12, batch=2)
    valid = torch.rand(2, 1, 140, generator=torch.Generator().manual_seed(1)) < 0.7
    x[~valid.expand(2, 2, 140)] = math.nan
    labels, centroids, sizes = implementation.kmeans(x, torch.zeros(2, 2, 6, 12), COLD, 2, valid)
    expected = reference.kmeans(torch.nan_to_num(x), torch.zeros(2, 2, 6, 12), COLD, 2, valid)
    assert torch.equal(sizes, expected[2])
    torch.testing.assert_close(centroids, expected[1], rtol=1e-5, atol=1e-5)
    assert bool(((labels >= 0) & (labels < 6)).all())


def test_empty_clusters_keep_their_centroids() -> None:
    x = clustered(80, 8, heads=1)
    start = torch.cat((x[:, :, :3], torch.full((1, 1, 2, 8), 100.0)), dim=2)
    _, centroids, sizes = implementation.kmeans(x, start, WARM, 2)
    assert sizes[0, 0, 3:].tolist() == [0, 0]
    assert torch.equal(centroids[:, :, 3:], start[:, :, 3:])


def test_a_token_with_nan_spoils_its_own_cluster_alone() -> None:
    x = clustered(90, 8, heads=1)
    x[0, 0, 17, 2] = math.nan
    labels, centroids, _ = implementation.kmeans(x, x[:, :, :5].contiguous(), WARM, 2)
    assert bool(((labels >= 0) & (labels < 5)).all())
    broken = ~centroids.isfinite().all(dim=-1)[0, 0]
    assert int(broken.sum()) == 1
    # A non-finite centroid is chosen by nobody: once spoilt, only the token itself is left in the cluster.
    later = implementation.kmeans(x, centroids, WARM, 1)[0][0, 0]
    others = torch.arange(90) != 17
    assert not bool(broken[later.long()][others].any())


def test_deterministic_and_independent_of_strides() -> None:
    x = clustered(130, 16)
    start = x[:, :, :6].float().contiguous()
    first = implementation.kmeans(x, start, WARM, 2)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    second = implementation.kmeans(strided, start, WARM, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("num_video", "start", "num_tokens", "num_clusters"),
    [(1, 0, 1, 1), (513, 0, 513, 5), (100, 7, 130, 11), (600, 20, 620, 200), (0, 0, 9, 3)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_order_is_the_stable_sort(num_video: int, start: int, num_tokens: int, num_clusters: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_clusters, (2, 2, num_video), generator=generator, dtype=torch.int32)
    valid = torch.rand(2, 1, num_tokens, generator=generator) < 0.7 if masked else None
    args = (labels, num_clusters, start, num_tokens, valid)
    for actual, expected in zip(implementation.cluster_order(*args), reference.cluster_order(*args), strict=True):
        assert torch.equal(actual, expected)


def test_order_with_one_giant_cluster_and_masks_per_head() -> None:
    labels = torch.full((1, 2, 700), 3, dtype=torch.int32)
    labels[..., ::97] = 0
    valid = torch.rand(1, 2, 700, generator=torch.Generator().manual_seed(0)) < 0.9
    for actual, expected in zip(
        implementation.cluster_order(labels, 5, 0, 700, valid),
        reference.cluster_order(labels, 5, 0, 700, valid),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 16, 40])
def test_permute_and_unpermute_are_exact(dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 77, head_dim, generator=generator).to(dtype)
    order = torch.argsort(torch.rand(2, 3, 77, generator=generator), dim=-1).to(torch.int32)
    permuted = implementation.permute_tokens(x, order)
    assert torch.equal(permuted, reference.permute_tokens(x, order)) and permuted.is_contiguous()
    restored = implementation.unpermute_tokens(permuted, order)
    assert torch.equal(restored, x)
    assert restored.stride() == reference.unpermute_tokens(permuted, order).stride()


def test_cluster_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 150, 20, generator=generator)
    offsets = random_offsets(generator, 2, 2, 9, 150)
    expected = reference.cluster_means(x, offsets)
    torch.testing.assert_close(implementation.cluster_means(x, offsets), expected, rtol=1e-5, atol=1e-6)
    assert bool((expected == 0).all(dim=-1).any())  # an empty cluster was among them
