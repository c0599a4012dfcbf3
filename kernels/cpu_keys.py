"""What query blocks attend to on the CPU: keys and values, and the means of skipped clusters, in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_MASK_ELEMENTS = 1 << 23  # of the masks that lists of keys are made from; a list takes 16 bytes per key meanwhile

Head = tuple[int, int]
"""Batch and head."""


class KeyTable:
    """Keys and values of some heads as float32 rows, head by head: the tokens, then the means of the clusters if
    skipped clusters take part through them. The last row has weight 0: it pads lists to one length."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        means: tuple[Tensor, Tensor] | None,
        heads: Sequence[Head],
    ) -> None:
        """key [B, Hkv, n, D], value [B, Hkv, n, Dv], offsets [B, Hkv, C + 3]; means: of the clusters' keys
        [B, Hkv, C, D] and values [B, Hkv, C, Dv], or None; heads: those to take."""
        self.num_tokens = key.shape[2]
        self.num_means = 0 if means is None else means[0].shape[2]
        self.sizes = [offsets[head].diff().to(torch.int64) for head in heads]
        self.block_of_key = [torch.repeat_interleave(torch.arange(len(sizes)), sizes) for sizes in self.sizes]
        mean_keys, mean_values = (None, None) if means is None else means
        self.key, self.value = _rows(key, mean_keys, heads), _rows(value, mean_values, heads)
        self.bias = self.key.new_zeros(self.key.shape[0])
        for position, sizes in enumerate(self.sizes):
            last = (position + 1) * self.rows_per_head
            self.bias[last - self.num_means : last] = sizes[: self.num_means].to(torch.float32).log()
        self.bias[-1] = -math.inf

    @property
    def rows_per_head(self) -> int:
        return self.num_tokens + self.num_means

    @property
    def padding_row(self) -> int:
        return self.key.shape[0] - 1

    def lists(self, position: int, selected: Tensor) -> Iterator[Tensor]:
        """The rows that each selection of the head at ``position`` attends to.

        selected: bool [R, C + 2]. Yields R ascending lists, int64.
        """
        sizes = self.sizes[position]
        at_once = max(1, MAX_MASK_ELEMENTS // max(1, self.rows_per_head))
        for part in selected.split(at_once):
            included = part.index_select(1, self.block_of_key[position])
            if self.num_means:
                # Compensation stands in for clusters that are not selected and not empty.
                skipped = ~part[:, : self.num_means] & (sizes[: self.num_means] > 0)
                included = torch.cat([included, skipped], dim=1)
            rows = included.nonzero()[:, 1] + position * self.rows_per_head
            yield from rows.split(included.sum(dim=1).tolist())

    def run_of_tokens(self, index: Tensor) -> slice | None:
        """A list as a slice if it is one run of tokens, as at top_p = 1: nothing to gather, no bias."""
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 != index.shape[0] or last % self.rows_per_head >= self.num_tokens:
            return None
        return slice(first, last + 1)


def _rows(tokens: Tensor, means: Tensor | None, heads: Sequence[Head]) -> Tensor:
    """Tokens [B, H, n, D] and means [B, H, C, D] (if any) of some heads, and a row of zeros: float32."""
    parts = [part[head] for head in heads for part in (tokens, means) if part is not None]
    table = tokens.new_empty(sum(part.shape[0] for part in parts) + 1, tokens.shape[3], dtype=torch.float32)
    first = 0
    for part in parts:
        table[first : first + part.shape[0]] = part
        first += part.shape[0]
    table[-1] = 0
    return table
