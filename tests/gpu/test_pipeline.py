"""The whole rewritten attention: equal to dense with all kept, as exact as the dense kernels, the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from svg2_compile.kernels import ops
from tests.gpu.support import no_host_synchronisation, poison_free_memory, sized, token_major, tokens
from tests.kernels.helpers import (
    UNIT_ROUNDOFF,
    assert_within_budget,
    attention_pipeline,
    make_problem,
    sample_arguments,
)
from tests.kernels.test_ops import SCHEMAS, SVG2

VIDEO = sized(1500, 90)
LAYOUTS: dict[str, dict[str, Any]] = {
    "video alone": {},
    "context after": {"after": 77},
    "context before and after": {"before": 33, "after": 44},
    "context and masked keys": {"before": 5, "after": 60, "masked": True},
    "grouped heads, batch 2": {"batch": 2, "q_heads": 4, "kv_heads": 2, "after": 9, "masked": True},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compensation": {"compensation": True},
    "error routing": {"compensation": True, "by_error": True},
}


def inputs(
    device: torch.device, dtype: torch.dtype, *, before: int = 0, after: int = 0, batch: int = 1, q_heads: int = 2,
    kv_heads: int = 2, masked: bool = False, head_dim: int = 64, seed: int = 0,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    """Query, key and value [B, H, N, D] as a model lays them out, and the options that describe them."""
    total = before + VIDEO + after
    heads = (q_heads, kv_heads, kv_heads)
    tensors = [
        token_major(tokens(total, head_dim, batch=batch, heads=count, seed=seed + i).to(device, dtype)) / 2
        for i, count in enumerate(heads)
    ]
    valid = None
    if masked:
        valid = torch.rand(batch, 1, total, generator=torch.Generator().manual_seed(seed)) < 0.8
        valid[..., 0] = True
        valid = valid.to(device)
    clusters = {"num_q_clusters": 6, "num_k_clusters": 20}
    return tensors, {"video": (before, before + VIDEO), "valid": valid, **clusters}


def dense(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    mask = None if valid is None else valid.unsqueeze(2)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_kept_equals_dense(layout: str, extra: str, device: torch.device) -> None:
    (query, key, value), options = inputs(device, torch.bfloat16, **LAYOUTS[layout])
    poison_free_memory(device)
    out, _ = attention_pipeline(query, key, value, top_p=1.0, **EXTRAS[extra], **options)
    exact = dense(query.double(), key.double(), value.double(), options["valid"])
    assert_within_budget(out, exact, dense(query, key, value, options["valid"]))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_kept_is_as_exact_as_the_dense_kernels(dtype: torch.dtype, head_dim: int, cuda: torch.device) -> None:
    """Relative error against float64, ours and of every dense kernel that runs here."""
    (query, key, value), options = inputs(cuda, dtype, q_heads=8, kv_heads=8, head_dim=head_dim)
    out, _ = attention_pipeline(query, key, value, top_p=1.0, **options)
    exact = dense(query.double(), key.double(), value.double(), None)

    def error(actual: Tensor) -> float:
        return float(torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact))

    others = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                others[backend.name] = error(scaled_dot_product_attention(query, key, value))
        except RuntimeError:
            continue  # this kernel does not take the width, or is not in this build
    assert others, "no dense kernel runs here"
    # 5 %: the two round the weights at different running maxima, which is chance.
    assert error(out) <= 1.05 * max(others.values()), f"{error(out):.3e} against {others}"
    assert error(out) <= 4 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("extra", EXTRAS)
def test_less_density_means_more_error_and_compensation_less(extra: str, device: torch.device) -> None:
    (query, key, value), options = inputs(device, torch.bfloat16, after=20)
    exact = dense(query.double(), key.double(), value.double(), None)
    errors = []
    for density in (0.1, 0.3, 1.0):
        out, block_map = attention_pipeline(query, key, value, density=density, **EXTRAS[extra], **options)
        errors.append(float((out.double() - exact).square().mean()))
        kept = block_map[..., :-2, :-2].float().mean()
        assert bool(kept < 1) == (density < 1)
    assert errors == sorted(errors, reverse=True) and errors[0] > 3 * errors[-1]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", ["video alone", "context and masked keys"])
def test_twice_the_same_bits(layout: str, extra: str, device: torch.device) -> None:
    (query, key, value), options = inputs(device, torch.bfloat16, **LAYOUTS[layout])
    results = []
    for _ in range(2):
        poison_free_memory(device)
        results.append(attention_pipeline(query, key, value, density=0.3, **EXTRAS[extra], **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------- operator by operator


def op_arguments(device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """The sample arguments of every op, on ``device``."""
    return {
        name: [tuple(a.to(device) if isinstance(a, Tensor) else a for a in args) for args in cases]
        for name, cases in sample_arguments().items()
    }


def flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, device: torch.device) -> None:
    for args in op_arguments(device)[name]:
        torch.library.opcheck(getattr(SVG2, name).default, args)


@pytest.mark.parametrize("name", SCHEMAS)
def test_op_is_deterministic_leaves_its_inputs_alone_and_reads_nothing_back(name: str, device: torch.device) -> None:
    op = getattr(SVG2, name).default
    for args in op_arguments(device)[name]:
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        first = flat(op(*args))
        with no_host_synchronisation(device):
            second = flat(op(*args))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_attention_reads_nothing_back(layout: str, extra: str, cuda: torch.device) -> None:
    (query, key, value), options = inputs(cuda, torch.bfloat16, **LAYOUTS[layout])

    def run() -> Tensor:
        return attention_pipeline(query, key, value, density=0.3, **EXTRAS[extra], **options)[0]

    expected = run()
    with no_host_synchronisation(cuda):
        actual = run()
    assert torch.equal(actual, expected)


def test_attention_is_repeatable_at_size(device: torch.device) -> None:
    """Many programs, tiles drawn from a counter in any order: a race would show as other bits."""
    size = sized(6001, 60)
    problem = make_problem(
        q_heads=sized(8, 1),
        kv_heads=sized(8, 1),
        num_queries=size,
        num_keys=size,
        head_dim=128,
        num_q_clusters=sized(40, 4),
        num_k_clusters=sized(120, 9),
        dtype=torch.bfloat16,
    )
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in problem.args(True))
    first = ops.block_sparse_attention(*args)
    for _ in range(sized(20, 1)):
        poison_free_memory(device)
        assert all(torch.equal(a, b) for a, b in zip(first, ops.block_sparse_attention(*args), strict=True))
