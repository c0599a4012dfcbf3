"""What the CPU benchmark compares with beside dense attention, and other processes that keep the cores busy."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.common import require_close

__all__ = ["busy_processes", "flex_peer", "sgemm", "sgemm_gflops"]

BLOCK = 128  # FlexAttention's own default
MATRIX = 2048


def sgemm() -> Callable[[], Tensor]:
    """A square float32 product of MATRIX rows: the rate of the machine, as its BLAS reaches it."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    return lambda: a @ b


def sgemm_gflops(milliseconds: float) -> float:
    return 2 * MATRIX**3 / milliseconds / 1e6


def flex_peer(query: Tensor, key: Tensor, value: Tensor, density: float, tolerance: float) -> Callable[[], object]:
    """FlexAttention over a random ``density`` of all blocks of 128 x 128 tokens, without clusters or compensation: what
    PyTorch's own block-sparse attention takes for as many pairs. Query, key and value [1, H, N, D].

    Raises AssertionError if its first rows are not those of masked dense attention.
    """
    num_heads, num_tokens = query.shape[1:3]
    blocks = num_tokens // BLOCK
    chosen = max(1, round(density * blocks))
    scores = torch.rand(1, num_heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    indices = scores.topk(chosen, dim=-1).indices.sort(dim=-1).values.to(torch.int32)
    counts = torch.full(indices.shape[:3], chosen, dtype=torch.int32)
    padded = torch.nn.functional.pad(indices, (0, blocks - chosen))
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(padded), counts, padded, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, fullgraph=True)
    run: Callable[[], Any] = functools.partial(compiled, query, key, value, block_mask=mask)
    seen = torch.zeros(num_heads, blocks, dtype=torch.bool).scatter_(-1, indices[0, :, 0].long(), True)
    mask_of_rows = seen.repeat_interleave(BLOCK, dim=-1)[None, :, None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :BLOCK].double(), key.double(), value.double(), attn_mask=mask_of_rows
    )
    require_close("FlexAttention", run()[:, :, :BLOCK].double(), exact, tolerance)
    return run


def _spin(running: Any) -> None:
    a = torch.randn(256, 256)
    torch.set_num_threads(1)
    running.set()
    while True:
        a = torch.tanh(a @ a / 16)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """``count`` other processes with one busy thread each, as on a machine that somebody else uses as well."""
    context = multiprocessing.get_context("spawn")
    started = [context.Event() for _ in range(count)]
    processes = [context.Process(target=_spin, args=(event,), daemon=True) for event in started]
    for process in processes:
        process.start()
    try:
        for event in started:
            if not event.wait(timeout=120):
                raise RuntimeError("a busy process did not start within two minutes")
        time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
