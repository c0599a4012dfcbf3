"""k-means, order and permutation on the CPU against the oracle and against their own definitions."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import assert_within_budget

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_kmeans(cpu: ModuleType, x: Tensor, start: Tensor, seeded: bool, iters: int, valid: Tensor | None) -> None:
    labels, centroids, sizes = cpu.kmeans(x, start, torch.tensor(seeded), iters, valid)
    num_clusters = start.shape[2]
    assert (labels.dtype, centroids.dtype, sizes.dtype) == (torch.int32, torch.float32, torch.int32)
    assert bool(((labels >= 0) & (labels < num_clusters)).all())
    counted = torch.ones(x.shape[:3], dtype=torch.bool) if valid is None else valid.expand(x.shape[:3])
    # Centroids and sizes are those of exactly these labels.
    one_hot = torch.nn.functional.one_hot(labels.long(), num_clusters) * counted.unsqueeze(-1)
    assert torch.equal(sizes, one_hot.sum(dim=2).to(torch.int32))
    members = torch.where(counted.unsqueeze(-1), x.double(), 0.0)
    means = one_hot.double().transpose(-1, -2) @ members / sizes.clamp(min=1).unsqueeze(-1)
    filled = sizes > 0
    assert_within_budget(centroids[filled], means[filled])
    # Each label is nearest, up to rounding, to the centroids that the oracle reaches one iteration earlier.
    if iters > 1:
        before = reference.kmeans(x.double(), start.double(), torch.tensor(seeded), iters - 1, valid, compute_dtype=F64)
        if not torch.equal(before[0], cpu.kmeans(x, start, torch.tensor(seeded), iters - 1, valid)[0]):
            return  # a tie was broken the other way: from there on the two runs are different, and both right
        start = before[1]
    elif not seeded:
        return
    distances = torch.cdist(x.double(), start.double())
    chosen = distances.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    slack = 1e-5 * (x.double().norm(dim=-1) + start.double().norm(dim=-1).amax())
    assert bool((chosen <= distances.amin(dim=-1) + slack)[counted].all())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 200), st.integers(1, 20)),
    fraction=st.floats(0.0, 1.0),
    seeded=st.booleans(),
    iters=st.integers(1, 3),
    mask=st.sampled_from(["none", "shared", "per head"]),
    dtype=st.sampled_from(DTYPES),
    input_scale=st.sampled_from([1.0, 16.0]),
)
def test_kmeans_over_random_problems(
    cpu: ModuleType,
    seed: int,
    shape: tuple[int, int, int, int],
    fraction: float,
    seeded: bool,
    iters: int,
    mask: str,
    dtype: torch.dtype,
    input_scale: float,
) -> None:
    torch.manual_seed(seed)
    batch, heads, num_tokens, head_dim = shape
    num_clusters = max(1, round(fraction * num_tokens))
    x = (input_scale * torch.randn(shape)).to(dtype)
    start = input_scale * torch.randn(batch, heads, num_clusters, head_dim)
    mask_heads = {"none": 0, "shared": 1, "per head": heads}[mask]
    valid = torch.rand(batch, mask_heads, num_tokens) < 0.7 if mask_heads else None
    check_kmeans(cpu, x, start, seeded, iters, valid)


def test_kmeans_equals_the_oracle_on_separated_clusters(cpu: ModuleType) -> None:
    torch.manual_seed(0)
    centers = 50 * torch.randn(1, 2, 7, 5)
    x = (centers.repeat(1, 1, 30, 1) + torch.randn(1, 2, 210, 5))[:, :, torch.randperm(210)]
    for seeded, start in ((True, centers), (False, torch.full_like(centers, math.nan))):
        actual = cpu.kmeans(x, start, torch.tensor(seeded), 3)
        expected = reference.kmeans(x, start, torch.tensor(seeded), 3)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kmeans_with_broken_tokens_and_centroids(cpu: ModuleType, bad: float) -> None:
    torch.manual_seed(0)
    x, start = torch.randn(1, 1, 50, 4), torch.randn(1, 1, 6, 4)
    x[0, 0, 7, 1] = bad
    start[0, 0, 2, 0] = bad
    for implementation in (cpu, reference):
        labels, centroids, sizes = implementation.kmeans(x, start, torch.tensor(True), 3)
        assert bool(((labels >= 0) & (labels < 6)).all())
        assert int(sizes.sum()) == 50
        assert not bool(centroids[0, 0, int(labels[0, 0, 7])].isfinite().all())
        broken = ~centroids[0, 0].isfinite().all(dim=-1)
        # A broken centroid attracts nobody: only the broken token sits in a broken cluster.
        assert int(sizes[0, 0][broken].sum()) == 1


def test_kmeans_masked_garbage_is_never_read(cpu: ModuleType) -> None:
    torch.manual_seed(0)
    x, start = torch.randn(2, 2, 40, 4), torch.randn(2, 2, 5, 4)
    valid = torch.rand(2, 1, 40) < 0.5
    expected = cpu.kmeans(x, start, torch.tensor(True), 2, valid)
    x[~valid.expand(2, 2, 40)] = math.nan
    actual = cpu.kmeans(x, start, torch.tensor(True), 2, valid)
    assert torch.equal(actual[1], expected[1])
    nothing_valid = cpu.kmeans(x, start, torch.tensor(False), 2, torch.zeros_like(valid))
    assert int(nothing_valid[2].sum()) == 0


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    layout=st.tuples(st.integers(0, 20), st.integers(0, 90), st.integers(0, 20)),
    num_clusters=st.integers(1, 12),
    mask=st.sampled_from(["none", "shared", "per head", "nothing"]),
)
def test_order_equals_the_oracle_and_permutes_exactly(
    cpu: ModuleType, seed: int, batch: int, heads: int, layout: tuple[int, int, int], num_clusters: int, mask: str
) -> None:
    torch.manual_seed(seed)
    before, video, after = layout
    num_tokens = before + video + after
    labels = torch.randint(0, num_clusters, (batch, heads, video), dtype=torch.int32)
    mask_heads = {"none": 0, "shared": 1, "per head": heads, "nothing": 1}[mask]
    valid = torch.rand(batch, mask_heads, num_tokens) < (0.0 if mask == "nothing" else 0.7) if mask_heads else None
    order, offsets = cpu.cluster_order(labels, num_clusters, before, num_tokens, valid)
    expected = reference.cluster_order(labels, num_clusters, before, num_tokens, valid)
    assert torch.equal(order, expected[0])
    assert torch.equal(offsets, expected[1])
    x = torch.randn(batch, heads, num_tokens, 3)
    permuted = cpu.permute_tokens(x, order)
    assert torch.equal(permuted, reference.permute_tokens(x, order))
    restored = cpu.unpermute_tokens(permuted, order)
    assert torch.equal(restored, x)
    assert restored.transpose(1, 2).is_contiguous()
    assert torch.equal(reference.unpermute_tokens(permuted, order), x)
    means = cpu.cluster_means(permuted, offsets)
    assert_within_budget(means, reference.cluster_means(permuted, offsets, compute_dtype=F64).double())


def test_labels_out_of_range_are_refused(cpu: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"labels lie in \[0, 5\]; valid: \[0, 3\)"):
        cpu.cluster_order(torch.tensor([[[0, 5]]], dtype=torch.int32), 3, 0, 2)
