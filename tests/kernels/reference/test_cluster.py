"""The oracle's k-means and order against brute force and small cases by hand."""

from __future__ import annotations

import math

import torch

from svg2_compile.kernels.reference import implementation as reference

F64 = torch.float64


def test_kmeans_labels_are_nearest_and_centroids_their_means() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 57, 6)
    start = torch.randn(2, 3, 8, 6)
    labels, centroids, sizes = reference.kmeans(x, start, torch.tensor(True), 1, compute_dtype=F64)
    distances = torch.cdist(x.to(F64), start.to(F64))
    assert torch.equal(labels.long(), distances.argmin(dim=-1))
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(8)).tolist():
        members = x[b, h][labels[b, h] == c]
        assert sizes[b, h, c] == members.shape[0]
        expected = members.mean(dim=0) if members.shape[0] else start[b, h, c]
        torch.testing.assert_close(centroids[b, h, c], expected)


def test_kmeans_seeds_are_spread_over_valid_tokens() -> None:
    x = torch.arange(12.0).view(1, 1, 12, 1)
    valid = torch.ones(1, 1, 12, dtype=torch.bool)
    valid[..., :4] = False
    ignored = torch.full((1, 1, 2, 1), math.nan)
    _, centroids, sizes = reference.kmeans(x, ignored, torch.tensor(False), 1, valid)
    # Seeds are tokens 6 and 10 of the valid ones 4..11; token 8 is as near to one as to the other and goes to the
    # first.
    assert sizes.tolist() == [[[5, 3]]]
    assert centroids.flatten().tolist() == [6.0, 10.0]


def test_kmeans_lowers_the_within_cluster_distance() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 300, 4)
    errors = []
    for iters in (1, 2, 4, 8):
        labels, centroids, _ = reference.kmeans(x, torch.zeros(1, 1, 9, 4), torch.tensor(False), iters)
        errors.append((x[0, 0] - centroids[0, 0][labels[0, 0].long()]).square().sum().item())
    assert errors == sorted(errors, reverse=True)


def test_cluster_order_by_hand() -> None:
    labels = torch.tensor([[[1, 0, 1, 0]]], dtype=torch.int32)
    valid = torch.tensor([[[True, True, True, False, True, True, False]]])
    order, offsets = reference.cluster_order(labels, 3, 1, 7, valid)
    # Tokens 1..4 are video, 0, 5 and 6 context; 3 and 6 are masked. Cluster 2 is empty.
    assert order.tolist() == [[[2, 4, 1, 0, 5, 3, 6]]]
    assert offsets.tolist() == [[[0, 2, 3, 3, 5, 7]]]
