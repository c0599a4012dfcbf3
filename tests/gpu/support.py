"""What the GPU tests share: moving problems to the device, poisoning its free memory, error budgets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import Problem, assert_within_budget

__all__ = [
    "check_attention",
    "moved",
    "no_host_synchronisation",
    "poison_free_memory",
    "poisoned",
    "shuffled",
    "sized",
    "token_major",
    "tokens",
]

F64 = torch.float64
Result = TypeVar("Result")


def sized(on_gpu: int, on_cpu: int) -> int:
    """A size: the real one on a GPU, a small one in a rehearsal."""
    return on_gpu if torch.cuda.is_available() else on_cpu


def moved(args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Tensors among ``args`` on ``device``, with their strides."""
    return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)


def poison_free_memory(device: torch.device, mib: int = 256) -> None:
    """Leave NaN (and -1 for integers) in the blocks that the caching allocator hands out next: what a kernel does not
    write then shows. Does nothing on a CPU."""
    if device.type != "cuda":
        return
    small = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in (512, 8192, 1 << 18) * 8]
    large = [torch.full((size << 20,), 255, dtype=torch.uint8, device=device) for size in (2, 2, 4, 16, mib)]
    del small, large


def poisoned(device: torch.device, op: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """``op`` called with memory poisoned just before."""
    poison_free_memory(device)
    return op(*args, **kwargs)


@contextlib.contextmanager
def no_host_synchronisation(device: torch.device) -> Iterator[None]:
    """Inside, an operation that waits for the device raises RuntimeError. Nothing is checked on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tokens(num_tokens: int, head_dim: int, *, batch: int = 1, heads: int = 2, seed: int = 0, topics: int = 9) -> Tensor:
    """float32 [B, H, N, D] on the CPU around a few centres, as keys are: nearest centroids are clear."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(batch, heads, topics, head_dim, generator=generator)
    topic = torch.randint(0, topics, (num_tokens,), generator=generator)
    return centres[:, :, topic] + 0.5 * torch.randn(batch, heads, num_tokens, head_dim, generator=generator)


def token_major(x: Tensor) -> Tensor:
    """The same [B, H, N, D] laid out as a contiguous [B, N, H, D], as models hand it over."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def shuffled(problem: Problem, side: str) -> tuple[Tensor, Tensor]:
    """A random order int32 [B, H, N] of the queries or keys, and its inverse int64: token-order x is
    x.gather(2, inverse)."""
    x = problem.query if side == "query" else problem.key
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(x.shape[:3], generator=generator).argsort(dim=-1)
    return order.to(torch.int32), order.argsort(dim=-1)


def in_token_order(x: Tensor, inverse: Tensor) -> Tensor:
    """Permuted rows x [B, H, N, D] put back where ``inverse`` int64 [B, H, N] says."""
    return x.gather(2, inverse.unsqueeze(-1).expand_as(x))


def score_slack(problem: Problem) -> float:
    """Roundings to allow beside eager's own where float32 products are three TF32 products.

    These keep about 2^-20 of |q| |k|, eager all of 2^-24; an error of the scores is one of the weights.
    """
    if problem.query.dtype != torch.float32 or problem.query.numel() == 0 or problem.key.numel() == 0:
        return 16.0
    norms = [x.double().norm(dim=-1).max().item() for x in (problem.query, problem.key)]
    return 64.0 + 2 * 2.0**4 * abs(problem.scale) * math.prod(norms)


def check_attention(
    problem: Problem, device: torch.device, compensation: bool = False, orders: bool = False, **options: Any
) -> None:
    """block_sparse_attention on ``device`` against the oracle in float64 on the CPU.

    orders: hand over tokens in a shuffled order, token-major, with q_order and k_order.
    """
    args = problem.args(compensation)
    exact, exact_lse = reference.block_sparse_attention(*_doubled(args), compute_dtype=F64)
    eager, eager_lse = reference.block_sparse_attention(*args, compute_dtype=problem.query.dtype)
    if orders:
        q_order, q_inverse = shuffled(problem, "query")
        k_order, k_inverse = shuffled(problem, "key")
        query = token_major(in_token_order(problem.query, q_inverse))
        key, value = (token_major(in_token_order(x, k_inverse)) for x in (problem.key, problem.value))
        args = (query, key, value, *args[3:])
        options |= {"q_order": q_order.to(device), "k_order": k_order.to(device)}
        exact, eager = in_token_order(exact, q_inverse), in_token_order(eager, q_inverse)
        exact_lse, eager_lse = exact_lse.gather(2, q_inverse), eager_lse.gather(2, q_inverse)
    out, lse = poisoned(device, ops.block_sparse_attention, *moved(args, device), **options)
    assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
    assert (out.transpose(1, 2) if orders else out).is_contiguous()
    roundings = score_slack(problem)
    assert_within_budget(out.cpu(), exact, eager, roundings=roundings)
    assert torch.equal(lse.cpu() == -math.inf, exact_lse == -math.inf)
    finite = exact_lse > -math.inf
    # Products of 16-bit tokens are exact, so lse is a float32 result; but centroids are rounded to the tokens' dtype.
    rounded = eager_lse[finite] if compensation else None
    assert_within_budget(lse.cpu()[finite], exact_lse[finite].double(), rounded, roundings=64 + roundings)


def _doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
