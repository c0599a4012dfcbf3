"""Block-sparse attention on the CPU: gather the keys that a query block selected, then ATen's fused attention.

Keys of one head are gathered into one contiguous run per query block, so the work inside is the same dense kernel that
scaled_dot_product_attention uses, over fewer keys. That kernel shares out whole blocks of query rows among threads,
too few of them in one cluster to keep every core busy; so the keys are cut into equal parts, one per thread, and the
partial results are merged by their log-sum-exp. The mean keys of compensation are keys with a bias in the same call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from svg2_compile.kernels.cpu_cluster import permute_tokens, unpermute_tokens
from svg2_compile.kernels.tuning import tuned

MAX_MASK_ELEMENTS = 1 << 23  # of the masks that lists of keys are made from; a list takes 16 bytes per key meanwhile
MIN_FUSED_KEYS = 64  # with fewer keys than a vector has lanes (16), the fused kernel turns NaN scores into 0


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
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    workspace_mb: int = 256,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over its selected key blocks; see ``ops.block_sparse_attention``. Works on
    one head at a time, so its workspace is that of one head's tokens, whatever ``workspace_mb`` is."""
    if k_order is not None:
        key, value = permute_tokens(key, k_order), permute_tokens(value, k_order)
    if q_order is not None:
        query = permute_tokens(query, q_order)
    batch, q_heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    _check_offset_contents("q_offsets", q_offsets, num_queries)
    _check_offset_contents("k_offsets", k_offsets, key.shape[2])
    out = query.new_zeros(batch, q_heads, num_queries, value.shape[3])
    lse = query.new_full((batch, q_heads, num_queries), -math.inf, dtype=torch.float32)
    group = q_heads // max(kv_heads, 1)
    for b in range(batch):
        for g in range(kv_heads):
            means = None
            if k_centroids is not None and v_centroids is not None:
                means = (k_centroids[b, g], v_centroids[b, g])
            keys = HeadKeys(key[b, g], value[b, g], k_offsets[b, g], means)
            for h in range(g * group, (g + 1) * group):
                _attend_head(query[b, h], keys, q_offsets[b, h], block_map[b, h], scale, out[b, h], lse[b, h])
    if q_order is not None:
        return unpermute_tokens(out, q_order), torch.empty_like(lse).scatter_(2, q_order.to(torch.int64), lse)
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


def _attend_head(
    query: Tensor, keys: HeadKeys, q_offsets: Tensor, block_map: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write out [Nq, Dv] and lse [Nq] of one head; rows without any key are left as they are."""
    query = _as_float_rows(query)
    groups = list(_row_groups(q_offsets.tolist(), block_map))
    # Lists of keys for many groups at once: one call each instead of one per group, in bounded memory.
    at_once = max(1, MAX_MASK_ELEMENTS // max(1, keys.num_rows))
    for first in range(0, len(groups), at_once):
        chosen = groups[first : first + at_once]
        lists = keys.lists(torch.stack([group.selected for group in chosen]))
        for group, index in zip(chosen, lists, strict=True):
            if index.shape[0]:
                out[group.rows], lse[group.rows] = keys.attend(query[group.rows], index, scale)


class HeadKeys:
    """Keys and values of one head in one table: its tokens, the means of its clusters if skipped clusters take part
    through them, and a row of weight 0 that pads lists to equal parts."""

    def __init__(self, key: Tensor, value: Tensor, offsets: Tensor, means: tuple[Tensor, Tensor] | None) -> None:
        """key [n, D], value [n, Dv], offsets [C + 3]; means: the clusters' (keys [C, D], values [C, Dv]), or None."""
        sizes = offsets.diff().to(torch.int64)
        self.num_tokens = key.shape[0]
        self.num_means = 0 if means is None else means[0].shape[0]
        self.block_of_key = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)
        self.filled = sizes[: self.num_means] > 0
        self.limits = tuned("cpu_attention", key.device, key.dtype, key.shape[1], key.shape[0])
        mean_keys, mean_values = (None, None) if means is None else means
        self.key, self.value = _table(key, mean_keys), _table(value, mean_values)
        self.bias = self.key.new_zeros(self.num_rows)
        self.bias[self.num_tokens : -1] = sizes[: self.num_means].to(torch.float32).log()
        self.bias[-1] = -math.inf
        # Gathered rows: one workspace for all query blocks, no page faults in each of them.
        capacity = self.num_rows + torch.get_num_threads()
        self.gathered_key = self.key.new_empty(capacity, key.shape[1])
        self.gathered_value = self.value.new_empty(capacity, value.shape[1])

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.num_tokens + self.num_means + 1

    def lists(self, selected: Tensor) -> tuple[Tensor, ...]:
        """The rows of the table that each selection attends to: bool [R, C + 2] -> R lists of int64, ascending."""
        included = selected.index_select(1, self.block_of_key)
        if self.num_means:
            # Compensation stands in for clusters that are not selected and not empty.
            included = torch.cat([included, ~selected[:, : self.num_means] & self.filled], dim=1)
        return included.nonzero()[:, 1].split(included.sum(dim=1).tolist())

    def attend(self, query: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """float32 query [m, D] over the rows ``index`` of the table, at least one -> (out [m, Dv], lse [m])."""
        parts = key_parts(query.shape[0], index.shape[0], torch.get_num_threads(), self.limits)
        first, last = int(index[0]), int(index[-1])
        one_run = last - first + 1 == index.shape[0] and last < self.num_tokens  # as at top_p = 1
        padding = -index.shape[0] % parts
        if one_run and not padding:
            run = slice(first, last + 1)
            return attend_to_keys(query, self.key[run], self.value[run], None, scale, parts)
        if padding:
            index = torch.cat([index, index.new_full((padding,), self.num_rows - 1)])
        keys, values = self.gathered_key[: index.shape[0]], self.gathered_value[: index.shape[0]]
        torch.index_select(self.key, 0, index, out=keys)
        torch.index_select(self.value, 0, index, out=values)
        bias = self.bias.index_select(0, index) if padding or last >= self.num_tokens else None
        return attend_to_keys(query, keys, values, bias, scale, parts)


def _table(tokens: Tensor, means: Tensor | None) -> Tensor:
    """float32 rows: tokens [n, D], means [C, D] if any, and one of zeros."""
    table = tokens.new_zeros(tokens.shape[0] + (0 if means is None else means.shape[0]) + 1, tokens.shape[1]).float()
    table[: tokens.shape[0]] = tokens
    if means is not None:
        table[tokens.shape[0] : -1] = means
    return table


def key_parts(num_rows: int, num_keys: int, num_threads: int, limits: Mapping[str, int]) -> int:
    """Into how many equal parts to cut the keys so that every thread has as much to do.

    limits: MIN_KEYS_PER_PART, keys below which merging a part costs more than an idle core; MIN_IDLE_PAIRS, (query,
    key) pairs that threads could compute while they idle below which a merge costs more than it saves.
    """
    # Rows per unit of work in ATen's flash attention, by number of query rows.
    rows_per_unit = 256 if num_rows >= 768 else 64 if num_rows >= 192 else 32
    longest = math.ceil(math.ceil(num_rows / rows_per_unit) / num_threads) * rows_per_unit
    if (longest * num_threads - num_rows) * num_keys <= limits["MIN_IDLE_PAIRS"]:
        return 1
    return max(1, min(num_threads, num_keys // limits["MIN_KEYS_PER_PART"]))


def attend_to_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """Attention of query [m, D] over n keys, in ``parts`` equal runs: out [m, Dv], lse [m]; all float32.

    ``bias`` [n] is added to the scaled scores of each key. n must be a multiple of ``parts``.
    """
    if key.shape[0] < MIN_FUSED_KEYS:
        scores = torch.mm(query, key.t()).mul_(scale)
        scores = scores if bias is None else scores.add_(bias)
        return torch.softmax(scores, dim=1) @ value, torch.logsumexp(scores, dim=1)
    head_dim, value_dim = query.shape[1], value.shape[1]
    width = max(head_dim, value_dim)  # the kernel wants equal widths: zeros change neither scores nor sums
    if head_dim < width:
        query, key = (torch.nn.functional.pad(t, (0, width - head_dim)) for t in (query, key))
    if value_dim < width:
        value = torch.nn.functional.pad(value, (0, width - value_dim))
    num_rows, keys_per_part = query.shape[0], key.shape[0] // parts
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.expand(parts, 1, num_rows, width),
        key.view(parts, 1, keys_per_part, width),
        value.view(parts, 1, keys_per_part, width),
        attn_mask=None if bias is None else bias.view(parts, 1, 1, -1).expand(-1, -1, num_rows, -1),
        scale=scale,
    )
    out, lse = out[:, 0, :, :value_dim], lse[:, 0]
    return (out[0], lse[0]) if parts == 1 else merge_partial_softmax(out, lse)


def merge_partial_softmax(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the out [p, m, Dv] and lse [p, m] of each."""
    largest = lse.amax(dim=0)
    weights = (lse - largest).exp_()
    total = weights.sum(dim=0)
    weights /= total
    merged = out[0] * weights[0].unsqueeze(-1)
    for part in range(1, out.shape[0]):
        merged.addcmul_(out[part], weights[part].unsqueeze(-1))
    return merged, total.log_().add_(largest)
