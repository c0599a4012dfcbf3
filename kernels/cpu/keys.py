"""What query blocks attend to on the CPU: keys and values, and the means of skipped clusters, in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from svg2_compile.kernels.cpu.cluster import gather_rows

MAX_LISTED_AT_ONCE = 1 << 20  # keys; a list takes 32 bytes per key while it is made

Head = tuple[int, int]
"""Batch and head."""


class KeyTable:
    """Keys and values of some heads as float32 rows, head by head: the tokens, then the means of the clusters if
    skipped clusters take part through them. The last row has weight 0: it pads lists to one length. A key and its value
    lie side by side: they are gathered together."""

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
        self.head_dim = key.shape[3]
        width = self.head_dim + value.shape[3]
        self.rows = key.new_zeros(len(heads) * self.rows_per_head + 1, width, dtype=torch.float32)
        mean_key, mean_value = (None, None) if means is None else means
        tables = self.rows[:-1].unflatten(0, (len(heads), self.rows_per_head))
        for table, head in zip(tables, heads, strict=True):
            for half, tokens, mean in zip(self._split(table), (key, value), (mean_key, mean_value), strict=True):
                half[: self.num_tokens] = tokens[head]
                if mean is not None:
                    half[self.num_tokens :] = mean[head]
        self.bias = self.rows.new_zeros(self.rows.shape[0])
        for position, sizes in enumerate(self.sizes):
            last = (position + 1) * self.rows_per_head
            self.bias[last - self.num_means : last] = sizes[: self.num_means].to(torch.float32).log()
        self.bias[-1] = -math.inf

    @property
    def rows_per_head(self) -> int:
        return self.num_tokens + self.num_means

    @property
    def padding_row(self) -> int:
        return self.rows.shape[0] - 1

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., D] and values [..., Dv] of the rows of an index [...]."""
        return self._split(gather_rows(self.rows, index))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[..., : self.head_dim], rows[..., self.head_dim :]

    def lists(self, position: int, selected: Tensor) -> Iterator[Tensor]:
        """The rows that each selection of the head at ``position`` attends to.

        selected: bool [R, C + 2]. Yields R ascending lists, int64.
        """
        sizes = self.sizes[position]
        # Every block is a run of rows, and so is every mean.
        starts = torch.cat([sizes.cumsum(dim=0) - sizes, self.num_tokens + torch.arange(self.num_means)])
        starts += position * self.rows_per_head
        lengths = torch.cat([sizes, sizes.new_ones(self.num_means)])
        filled = sizes[: self.num_means] > 0
        for part in selected.split(max(1, MAX_LISTED_AT_ONCE // max(1, self.rows_per_head))):
            if self.num_means:
                # Compensation stands in for clusters that are not selected and not empty.
                part = torch.cat([part, ~part[:, : self.num_means] & filled], dim=1)
            runs = part.nonzero()[:, 1]
            length = lengths[runs]
            num_rows = (part * lengths).sum(dim=1).tolist()
            # Run i starts where those before it end: adding up from there gives the rows of the table.
            shift = starts[runs] - (length.cumsum(dim=0) - length)
            rows = torch.repeat_interleave(shift, length, output_size=sum(num_rows))
            yield from rows.add_(torch.arange(rows.shape[0])).split(num_rows)

    def run_of_tokens(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Views of the keys and values of a list if it is one run of tokens, as at top_p = 1: nothing to gather, no
        bias."""
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 != index.shape[0] or last % self.rows_per_head >= self.num_tokens:
            return None
        return self._split(self.rows[first : last + 1])
