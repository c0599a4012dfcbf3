"""Input out of contract: every error names the argument, the value given and what is valid."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import contracts, ops, validation
from tests.kernels.helpers import make_problem, sample_arguments

ARGUMENTS = sample_arguments()
YES = torch.tensor(True)


def kmeans_args(**changes: object) -> dict[str, object]:
    args: dict[str, object] = {"x": torch.zeros(1, 2, 5, 3), "centroids": torch.zeros(1, 2, 2, 3), "seeded": YES}
    return {**args, "iters": 1, **changes}


def select_args(**changes: object) -> dict[str, object]:
    sizes = torch.ones(1, 2, 3, dtype=torch.int32)
    args: dict[str, object] = {"q_centroids": torch.zeros(1, 2, 3, 4), "k_centroids": torch.zeros(1, 2, 3, 4)}
    return {**args, "q_sizes": sizes, "k_sizes": sizes, "scale": 1.0, "top_p": 0.9, "min_k_ratio": 0.1, **changes}


def attention_args(**changes: object) -> dict[str, object]:
    problem = make_problem()
    names = ("query", "key", "value", "q_offsets", "k_offsets", "block_map", "scale", "k_centroids", "v_centroids")
    return {**dict(zip(names, problem.args(compensation=True), strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": torch.zeros(1, 2, 0, 3)}, "centroids has 0 clusters for 5 tokens; valid: 1 to 5 clusters"),
        ({"centroids": torch.zeros(1, 2, 6, 3)}, "centroids has 6 clusters for 5 tokens; valid: 1 to 5 clusters"),
        ({"centroids": torch.zeros(1, 2, 2, 4)}, r"centroids has shape \[1, 2, 2, 4\]; valid: .* = \[1, 2, \*, 3\]"),
        ({"centroids": torch.zeros(1, 1, 2, 3)}, r"centroids has shape \[1, 1, 2, 3\]"),
        ({"x": torch.zeros(2, 5, 3)}, r"x has shape \[2, 5, 3\]; valid: \[B, H, N, D\]"),
        ({"x": torch.zeros(1, 2, 0, 3)}, "centroids has 2 clusters for 0 tokens"),
        ({"iters": 0}, "iters is 0; valid: an integer of at least 1"),
        ({"seeded": torch.ones(2, dtype=torch.bool)}, r"seeded has shape \[2\]; valid: a scalar"),
        ({"valid": torch.ones(1, 3, 5, dtype=torch.bool)}, r"valid has shape \[1, 3, 5\]; valid: \[B, 1 or H, N\]"),
        ({"valid": torch.ones(1, 1, 4, dtype=torch.bool)}, r"valid has shape \[1, 1, 4\]"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, r"valid has shape \[5\]"),
    ],
)
def test_kmeans_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"svg2::kmeans: {message}"):
        ops.kmeans(**kmeans_args(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 5, 3, dtype=torch.float64)}, "x has dtype float64; valid: float32, bfloat16, float16"),
        ({"x": torch.zeros(1, 2, 5, 3, dtype=torch.int32)}, "x has dtype int32"),
        ({"centroids": torch.zeros(1, 2, 2, 3, dtype=torch.bfloat16)}, "centroids has dtype bfloat16; valid: float32"),
        ({"seeded": torch.tensor(1)}, "seeded has dtype int64; valid: bool"),
        ({"valid": torch.ones(1, 1, 5)}, "valid has dtype float32; valid: bool"),
    ],
)
def test_kmeans_dtypes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=f"svg2::kmeans: {message}"):
        ops.kmeans(**kmeans_args(**changes))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, 2, 9), "start is 2 with 8 video tokens in num_tokens = 9; valid: 0 <= start and start"),
        ((3, -1, 9), "start is -1"),
        ((0, 0, 9), "num_clusters is 0; valid: an integer of at least 1"),
    ],
)
def test_cluster_order(args: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"svg2::cluster_order: {message}"):
        ops.cluster_order(torch.zeros(1, 1, 8, dtype=torch.int32), *args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": -0.1}, r"top_p is -0.1; valid: a number in \[0.0, inf\]"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_k_ratio": 1.1}, r"min_k_ratio is 1.1; valid: a number in \[0.0, 1.0\]"),
        ({"density": 2.0}, "density is 2.0"),
        ({"scale": float("inf")}, "scale is inf; valid: a finite number"),
        ({"k_centroids": torch.zeros(1, 2, 0, 4)}, "k_centroids 0; valid: at least 1 of each"),
        ({"k_centroids": torch.zeros(1, 2, 3, 5)}, r"k_centroids has shape \[1, 2, 3, 5\]"),
        ({"k_sizes": torch.ones(1, 2, 4, dtype=torch.int32)}, r"k_sizes has shape \[1, 2, 4\]"),
        (
            {"k_centroids": torch.zeros(1, 3, 3, 4), "k_sizes": torch.ones(1, 3, 3, dtype=torch.int32)},
            "query has 2 heads and key has 3; valid: a number of query heads that is a multiple",
        ),
    ],
)
def test_select_blocks(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"svg2::select_blocks: .*{message}"):
        ops.select_blocks(**select_args(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(1, 2, 170, 8)}, r"key has shape \[1, 2, 170, 8\]; valid: .* = \[1, \*, \*, 16\]"),
        ({"value": torch.zeros(1, 2, 169, 16)}, r"value has shape \[1, 2, 169, 16\]"),
        ({"q_offsets": torch.zeros(1, 2, 3, dtype=torch.int32)}, "q_offsets has 3 boundaries; valid: at least 4"),
        (
            {"block_map": torch.ones(1, 2, 6, 10, dtype=torch.bool)},
            r"block_map has shape \[1, 2, 6, 10\]; valid: .*11\]",
        ),
        ({"v_centroids": None}, r"v_centroids is None; valid: both centroids \(compensation\) or neither"),
        ({"k_centroids": None}, "k_centroids is None"),
        ({"k_centroids": torch.zeros(1, 2, 8, 16)}, r"k_centroids has shape \[1, 2, 8, 16\]"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_attention(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"svg2::block_sparse_attention: {message}"):
        ops.block_sparse_attention(**attention_args(**changes))


def test_attention_wants_one_dtype() -> None:
    mixed = attention_args(value=torch.zeros(1, 2, 170, 16, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="value has dtype bfloat16; valid: float32"):
        ops.block_sparse_attention(**mixed)
    double = attention_args(query=torch.zeros(1, 2, 130, 16, dtype=torch.float64))
    with pytest.raises(TypeError, match="query has dtype float64; valid: float32, bfloat16, float16"):
        ops.block_sparse_attention(**double)


def test_tokens_and_order() -> None:
    x = torch.zeros(1, 2, 5, 3)
    for op in (ops.permute_tokens, ops.unpermute_tokens):
        with pytest.raises(ValueError, match=r"order has shape \[1, 1, 5\]; valid: \[B, H, N\] = \[1, 2, 5\]"):
            op(x, torch.zeros(1, 1, 5, dtype=torch.int32))
        with pytest.raises(TypeError, match="order has dtype int64; valid: int32"):
            op(x, torch.zeros(1, 2, 5, dtype=torch.int64))


def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match="all tensors must be on one device; given: x on cpu, order on meta"):
        validation.require_same_device("permute_tokens", x=torch.zeros(1), order=torch.zeros(1, device="meta"))
    here, there = torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="all tensors must be on one device; given: x on cpu, order on meta"):
        validation.validate("permute_tokens", contracts.TOKENS_AND_ORDER, {"x": here, "order": there})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_tensor_of_every_op_is_checked(name: str) -> None:
    """A tensor that its op's contract forgot would reach a kernel unseen."""
    op, most_arguments = getattr(ops, name), max(ARGUMENTS[name], key=len)
    for index, given in enumerate(most_arguments):
        if isinstance(given, Tensor):
            parameter = list(inspect.signature(op).parameters)[index]
            for wrong, error in ((given.to(torch.complex64), TypeError), (given.new_zeros(1, 1, 1, 1, 1), ValueError)):
                with pytest.raises(error, match=f"svg2::{name}: {parameter} has "):
                    op(*most_arguments[:index], wrong, *most_arguments[index + 1 :])


def test_one_token_and_empty_batches_are_fine() -> None:
    one = torch.ones(1, 1, 1, 4)
    labels, centroids, sizes = ops.kmeans(one, torch.zeros(1, 1, 1, 4), torch.tensor(False), 3)
    assert (labels.tolist(), sizes.tolist()) == ([[[0]]], [[[1]]])
    assert torch.equal(centroids, one)
    for implementation in ("cpu", "reference"):
        with ops.use_implementation(implementation):
            _run_every_op_on_an_empty_batch()


def _run_every_op_on_an_empty_batch() -> None:
    x: Tensor = torch.zeros(0, 2, 6, 4)
    labels, centroids, sizes = ops.kmeans(x, torch.zeros(0, 2, 3, 4), torch.tensor(False), 1)
    order, offsets = ops.cluster_order(labels, 3, 0, 6)
    permuted = ops.permute_tokens(x, order)
    block_map = ops.select_blocks(centroids, centroids, sizes, sizes, 0.5, 0.9, 0.1)
    out, lse = ops.block_sparse_attention(permuted, permuted, permuted, offsets, offsets, block_map, 0.5)
    means = ops.cluster_means(permuted, offsets)
    limits = (0.5, 0.9, 0.1)
    by_error = ops.select_blocks_by_error(permuted, permuted, offsets, centroids, centroids, means, sizes, *limits)
    first_order, _ = _first_order(permuted, order, offsets, centroids, means, sizes)
    assert first_order.shape == out.shape
    assert ops.unpermute_tokens(out, order).shape == x.shape
    assert lse.shape == (0, 2, 6)
    assert block_map.shape == by_error.shape == (0, 2, 5, 5)
    assert ops.block_density(offsets, offsets, block_map).shape == (0, 2)


def _first_order(
    x: Tensor, order: Tensor, offsets: Tensor, centroids: Tensor, v_means: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """First-order attention of tokens to themselves, with all the ops that belong to it."""
    variances = ops.cluster_variances(x, order, offsets, centroids)
    far_members = ops.farthest_members(x, order, offsets, centroids, 3)
    clustered = (x, x, offsets, centroids, centroids, v_means)
    log_mass, log_error = ops.block_estimates(*clustered, 0.5)
    density = torch.tensor(0.3)
    estimates = (log_mass, log_error, variances)
    block_map = ops.select_blocks_of_layer(*estimates, centroids, sizes, offsets, 0.5, density, far_members)
    terms = ops.first_order_terms(*clustered, log_mass, block_map, 0.5)
    blocks = (offsets, offsets, block_map, 0.5)
    result: tuple[Tensor, Tensor] = ops.first_order_attention(x, x, x, *blocks, *clustered[3:], log_mass, *terms)
    return result
