"""Rows moved by an order: gather and scatter. Exact for every dtype."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg2_compile.kernels.triton.launch import device_of, padded, row_strides, rows_dense
from svg2_compile.kernels.triton.primitives import head_base, load_rows, store_rows

__all__ = ["permute_tokens", "unpermute_tokens"]

BYTES_PER_TILE = 16384  # of rows in one program: enough loads in flight to fill the memory system


@triton.jit(do_not_specialize=["num_tokens"])
def _move_rows(
    x, order, out, num_tokens, num_heads, x_b, x_h, x_n, out_b, out_h, out_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """out[r] = x[order[r]] (gather) or out[order[r]] = x[r] (scatter)."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < num_tokens
    token = tl.load(order + group.to(tl.int64) * num_tokens + row, mask=present, other=0)
    x += head_base(group, num_heads, x_b, x_h)
    out += head_base(group, num_heads, out_b, out_h)
    source = token if GATHER else row
    target = row if GATHER else token
    tile = load_rows(x, source, present, x_n, WIDTH, BLOCK_D)
    store_rows(out, target, present, out_n, tile, WIDTH, BLOCK_D)


def _launch_move(x: Tensor, order: Tensor, out: Tensor, gather: bool) -> Tensor:
    batch, heads, num_tokens, width = x.shape
    if x.numel() == 0:
        return out
    x, order = rows_dense(x), order.contiguous()
    block_d = padded(width)
    rows = max(8, BYTES_PER_TILE // (block_d * x.element_size()))
    grid = (triton.cdiv(num_tokens, rows), batch * heads)
    with device_of(x):
        _move_rows[grid](
            *(x, order, out, num_tokens, heads, *row_strides(x), *row_strides(out)),
            **{"ROWS": rows, "WIDTH": width, "BLOCK_D": block_d, "GATHER": gather, "num_warps": 4},
        )
    return out


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Row r of the result is token order[r]; see ``ops.permute_tokens``."""
    return _launch_move(x, order, x.new_empty(x.shape), gather=True)


def unpermute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token order[r] of the result is row r, laid out token by token; see ``ops.unpermute_tokens``."""
    batch, heads, num_tokens, width = x.shape
    out = x.new_empty(batch, num_tokens, heads, width).transpose(1, 2)
    return _launch_move(x, order, out, gather=False)
