"""Block-sparse attention on the CPU: gather the keys that a query block selected, then ATen's fused attention.

Keys of one head are gathered into one contiguous run per query block (4 % of the time of the attention that follows),
so the work inside is the same dense kernel that scaled_dot_product_attention uses, at the same rate, over fewer keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NUM_EXTRA_BLOCKS = 2  # context and null


class RowGroup(NamedTuple):
    """Consecutive query blocks that select the same key blocks."""

    rows: slice
    selected: Tensor  # bool [Ck + 2]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    k_centroids: Tensor | None = None,
    v_centroids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its selected key blocks; see ``ops.block_sparse_attention``."""
    batch, q_heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    _check_offset_contents("q_offsets", q_offsets, num_queries)
    _check_offset_contents("k_offsets", k_offsets, key.shape[2])
    out = query.new_zeros(batch, q_heads, num_queries, value.shape[3])
    lse = query.new_full((batch, q_heads, num_queries), -math.inf, dtype=torch.float32)
    for b in range(batch):
        for g in range(kv_heads):
            head_keys = HeadKeys(
                _as_float_rows(key[b, g]),
                _as_float_rows(value[b, g]),
                k_offsets[b, g],
                None if k_centroids is None else k_centroids[b, g],
                None if v_centroids is None else v_centroids[b, g],
            )
            for h in range(g * (q_heads // kv_heads), (g + 1) * (q_heads // kv_heads)):
                for group in _row_groups(q_offsets[b, h].tolist(), block_map[b, h]):
                    result = head_keys.attend(_as_float_rows(query[b, h, group.rows]), group.selected, scale)
                    if result is not None:
                        out[b, h, group.rows], lse[b, h, group.rows] = result
    return out, lse


def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected pairs over all pairs; see ``ops.block_density``."""
    heads_per_group = block_map.shape[1] // max(k_offsets.shape[1], 1)
    q_sizes = q_offsets.diff(dim=-1).to(torch.float64)
    k_sizes = k_offsets.diff(dim=-1).to(torch.float64).repeat_interleave(heads_per_group, dim=1)
    keys_per_row = torch.matmul(block_map.to(torch.float64), k_sizes.unsqueeze(-1)).squeeze(-1)
    all_pairs = q_sizes.sum(dim=-1) * k_sizes.sum(dim=-1)
    return ((q_sizes * keys_per_row).sum(dim=-1) / all_pairs.clamp(min=1)).to(torch.float32)


def _check_offset_contents(name: str, offsets: Tensor, num_tokens: int) -> None:
    """Offsets index memory below: a wrong one must be an error here, not a crash there."""
    if offsets.numel() == 0:
        return
    ordered = bool((offsets.diff(dim=-1) >= 0).all())
    if not ordered or bool((offsets[..., 0] != 0).any()) or bool((offsets[..., -1] != num_tokens).any()):
        raise ValueError(
            f"svg2::block_sparse_attention: {name} is no partition of {num_tokens} tokens; "
            f"valid: boundaries that start at 0, never decrease and end at {num_tokens}"
        )


def _as_float_rows(tokens: Tensor) -> Tensor:
    """float32 [n, D] whose rows are dense, as the fused attention wants them; a view where that already holds."""
    tokens = tokens.to(torch.float32)
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _row_groups(q_bounds: list[int], block_map: Tensor) -> Iterator[RowGroup]:
    """Non-empty query blocks in order, neighbours with the same selection merged (all of them at top_p = 1)."""
    filled = [i for i in range(len(q_bounds) - 1) if q_bounds[i + 1] > q_bounds[i]]
    if not filled:
        return
    selections = block_map[filled]
    differs = (selections[1:] != selections[:-1]).any(dim=-1).tolist()
    first = 0
    for position in range(1, len(filled) + 1):
        if position == len(filled) or differs[position - 1]:
            rows = slice(q_bounds[filled[first]], q_bounds[filled[position - 1] + 1])
            yield RowGroup(rows, selections[first])
            first = position


class HeadKeys:
    """Keys and values of one head, and how to attend to some of their blocks."""

    def __init__(
        self, key: Tensor, value: Tensor, offsets: Tensor, k_centroids: Tensor | None, v_centroids: Tensor | None
    ) -> None:
        self.key = key
        self.value = value
        self.starts = offsets[:-1].to(torch.int64)
        self.sizes = offsets.diff().to(torch.int64)
        self.k_centroids = k_centroids
        self.v_centroids = v_centroids

    def attend(self, query: Tensor, selected: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """float32 query [m, D] -> (out [m, Dv], lse [m]); None where there is no key to attend to."""
        keys, values = self._gather(selected)
        exact = fused_attention(query, keys, values, scale) if keys.shape[0] > 0 else None
        if self.k_centroids is None or self.v_centroids is None:
            return exact
        num_clusters = self.k_centroids.shape[0]
        skipped = (~selected[:num_clusters] & (self.sizes[:num_clusters] > 0)).nonzero().squeeze(-1)
        if skipped.shape[0] == 0:
            return exact
        bias = self.sizes[skipped].to(torch.float32).log()
        approximate = fused_attention(query, self.k_centroids[skipped], self.v_centroids[skipped], scale, bias)
        return approximate if exact is None else merge_partial_softmax(exact, approximate)

    def _gather(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the selected blocks, each as one contiguous run (a view where they already are one)."""
        blocks = (selected & (self.sizes > 0)).nonzero().squeeze(-1)
        if blocks.shape[0] == 0:
            return self.key[:0], self.value[:0]
        starts, sizes = self.starts[blocks], self.sizes[blocks]
        total = int(sizes.sum())
        first, last = int(starts[0]), int(starts[-1] + sizes[-1])
        if last - first == total:
            return self.key[first:last], self.value[first:last]
        shift = starts - (sizes.cumsum(0) - sizes)  # from position in the gathered run to position in the head
        index = torch.arange(total) + torch.repeat_interleave(shift, sizes, output_size=total)
        return self.key.index_select(0, index), self.value.index_select(0, index)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ATen's CPU flash attention: [m, D], [n, D], [n, Dv], per-key bias [n] -> out [m, Dv], lse [m]; all float32."""
    head_dim, value_dim = query.shape[1], value.shape[1]
    width = max(head_dim, value_dim)  # the kernel wants equal widths: zeros change neither scores nor sums
    if head_dim < width:
        query, key = (torch.nn.functional.pad(t, (0, width - head_dim)) for t in (query, key))
    if value_dim < width:
        value = torch.nn.functional.pad(value, (0, width - value_dim))
    mask = None if bias is None else bias.expand(1, 1, query.shape[0], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None, None], key[None, None], value[None, None], attn_mask=mask, scale=scale
    )
    return out[0, 0, :, :value_dim], lse.flatten()


def merge_partial_softmax(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of two disjoint key sets from the (out, lse) of each."""
    lse = torch.logaddexp(first[1], second[1])
    out = first[0] * (first[1] - lse).exp().unsqueeze(-1)
    return out.addcmul_(second[0], (second[1] - lse).exp().unsqueeze(-1)), lse
