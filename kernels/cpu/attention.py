"""Block-sparse attention on the CPU: gather the keys that a query block selected, then ATen's fused attention.

The work inside is the same dense kernel that scaled_dot_product_attention uses, over fewer keys: those that a query
block selected are gathered into one contiguous run. A call for one block, a hundred rows or so, costs about as much in
overhead as in arithmetic and keeps few cores busy; so blocks of all heads with about as many rows and keys share a
call, padded with keys of weight 0. Where a call still is too small for the cores, its keys are cut into equal parts and
the partial results are merged by their log-sum-exp. Mean keys, of compensation, are keys with a bias in the same call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from svg2_compile.kernels.cpu.cluster import by_cluster, by_token, gather_rows
from svg2_compile.kernels.cpu.keys import Head, KeyTable
from svg2_compile.kernels.tuning.lookup import tuned

TABLE_BYTES = 1 << 24  # of the keys and values whose query blocks may share calls; one head at the least
MAX_LISTED_KEYS = 1 << 21  # in the lists that wait for others to share a call with
GATHERED_BYTES = 1 << 22  # of keys and values gathered for one call: they stay in the cache
MIN_FUSED_KEYS = 64  # with fewer keys than a vector has lanes (16), the fused kernel turns NaN scores into 0
MAX_PADDING = 1.125  # between the largest and the smallest of the blocks that share a call, of keys and of rows
GATHER_ROWS = 32  # fetching a key and its value costs about as much as attending to it from this many rows


class QueryGroup(NamedTuple):
    """Consecutive query blocks of one head that select the same key blocks, and the keys they attend to."""

    first_row: int  # of the queries of all heads
    num_rows: int
    key_rows: Tensor  # of the key table: int64, ascending, at least one

    @property
    def num_keys(self) -> int:
        return self.key_rows.shape[0]


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
    a few heads at a time (of a long video: one), so its workspace is that of their tokens, whatever ``workspace_mb``
    is."""
    query, key, value = by_cluster(query, key, value, q_order, k_order)
    means = None if k_centroids is None or v_centroids is None else (k_centroids, v_centroids)
    out, lse = attend_to_blocks((query, key, value), q_offsets, k_offsets, block_map, scale, means, query.dtype)
    return by_token(out, lse, q_order)


def attend_to_blocks(
    tokens: tuple[Tensor, Tensor, Tensor],
    q_offsets: Tensor,
    k_offsets: Tensor,
    block_map: Tensor,
    scale: float,
    means: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Nq, Dv] and lse float32 [B, Hq, Nq] of permuted query, key and value; with ``means`` of the keys and
    values of clusters, skipped clusters take part by them."""
    query, key, value = tokens
    batch, q_heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    check_offset_contents("q_offsets", q_offsets, num_queries)
    check_offset_contents("k_offsets", k_offsets, key.shape[2])
    rows = query.reshape(-1, query.shape[3])
    # One row more than there are queries: there the padding goes.
    out = query.new_zeros(rows.shape[0] + 1, value.shape[3], dtype=out_dtype)
    lse = query.new_full((rows.shape[0] + 1,), -math.inf, dtype=torch.float32)
    limits = tuned("cpu_attention", key.device, key.dtype, key.shape[3], key.shape[2])
    heads = [(b, g) for b in range(batch) for g in range(kv_heads)]
    at_once = max(1, TABLE_BYTES // max(1, 4 * key.shape[2] * (key.shape[3] + value.shape[3])))
    for first in range(0, len(heads), at_once):
        chosen = heads[first : first + at_once]
        keys = KeyTable(key, value, k_offsets, means, chosen)
        for together in _in_bounded_memory(_query_groups(keys, chosen, q_offsets, block_map, kv_heads)):
            for groups in shared_calls(together, GATHERED_BYTES // (4 * (key.shape[3] + value.shape[3]))):
                _attend(rows, keys, groups, scale, limits, out, lse)
    return out[:-1].view(batch, q_heads, num_queries, value.shape[3]), lse[:-1].view(batch, q_heads, num_queries)


def block_density(q_offsets: Tensor, k_offsets: Tensor, block_map: Tensor) -> Tensor:
    """Selected pairs over all pairs; see ``ops.block_density``."""
    heads_per_group = block_map.shape[1] // max(k_offsets.shape[1], 1)
    q_sizes = q_offsets.diff(dim=-1).to(torch.float64)
    k_sizes = k_offsets.diff(dim=-1).to(torch.float64).repeat_interleave(heads_per_group, dim=1)
    keys_per_row = torch.matmul(block_map.to(torch.float64), k_sizes.unsqueeze(-1)).squeeze(-1)
    all_pairs = q_sizes.sum(dim=-1) * k_sizes.sum(dim=-1)
    return ((q_sizes * keys_per_row).sum(dim=-1) / all_pairs.clamp(min=1)).to(torch.float32)


def check_offset_contents(name: str, offsets: Tensor, num_tokens: int) -> None:
    """Offsets index memory below: a wrong one must be an error here, not a crash there."""
    if offsets.numel() == 0:
        return
    ordered = bool((offsets.diff(dim=-1) >= 0).all())
    if not ordered or bool((offsets[..., 0] != 0).any()) or bool((offsets[..., -1] != num_tokens).any()):
        raise ValueError(
            f"svg2::block_sparse_attention: {name} is no partition of {num_tokens} tokens; "
            f"valid: boundaries that start at 0, never decrease and end at {num_tokens}"
        )


def _query_groups(
    keys: KeyTable, heads: Sequence[Head], q_offsets: Tensor, block_map: Tensor, kv_heads: int
) -> Iterator[QueryGroup]:
    """The query blocks that have rows and keys, of the heads of a table; neighbours with one selection are merged."""
    q_heads = block_map.shape[1]
    heads_per_group = q_heads // kv_heads
    for position, (b, g) in enumerate(heads):
        for h in range(g * heads_per_group, (g + 1) * heads_per_group):
            bounds = q_offsets[b, h].tolist()
            rows, selections = _merged_blocks(bounds, block_map[b, h])
            first_row = (b * q_heads + h) * bounds[-1]
            for (start, end), index in zip(rows, keys.lists(position, selections), strict=True):
                if index.shape[0]:
                    yield QueryGroup(first_row + start, end - start, index)


def _merged_blocks(q_bounds: list[int], block_map: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Non-empty query blocks, (start, end) of each and their selections [R, Ck + 2]; equal neighbours are one, as all
    are at top_p = 1."""
    filled = [i for i in range(len(q_bounds) - 1) if q_bounds[i + 1] > q_bounds[i]]
    selections = block_map[filled]
    changes = (selections[1:] != selections[:-1]).any(dim=-1).nonzero()[:, 0] + 1
    firsts = [0, *changes.tolist()] if filled else []
    starts = [q_bounds[filled[first]] for first in firsts]
    return list(zip(starts, [*starts[1:], q_bounds[-1]], strict=False)), selections[firsts]


def _in_bounded_memory(groups: Iterable[QueryGroup]) -> Iterator[list[QueryGroup]]:
    """The groups in order, as many at a time as their lists may take memory."""
    waiting: list[QueryGroup] = []
    listed = 0
    for group in groups:
        waiting.append(group)
        listed += group.num_keys
        if listed >= MAX_LISTED_KEYS:
            yield waiting
            waiting, listed = [], 0
    if waiting:
        yield waiting


def shared_calls(groups: Iterable[QueryGroup], max_keys: int) -> Iterator[list[QueryGroup]]:
    """Groups that are attended to in one call: about as many rows, about as many keys, at most ``max_keys`` in all."""

    def row_class(group: QueryGroup) -> int:
        return int(math.log(group.num_rows + GATHER_ROWS, MAX_PADDING))

    by_rows: dict[int, list[QueryGroup]] = defaultdict(list)
    for group in groups:
        by_rows[row_class(group)].append(group)
    for alike in by_rows.values():
        call: list[QueryGroup] = []
        for group in sorted(alike, key=lambda g: g.num_keys):
            limit = min(MAX_PADDING * call[0].num_keys, max_keys / (len(call) + 1)) if call else math.inf
            if group.num_keys > limit:
                yield call
                call = []
            call.append(group)
        yield call


def _attend(
    rows: Tensor,
    keys: KeyTable,
    groups: Sequence[QueryGroup],
    scale: float,
    limits: Mapping[str, int],
    out: Tensor,
    lse: Tensor,
) -> None:
    """One call: reads the groups' rows of the queries [M, D] and writes those of out [M + 1, Dv] and lse [M + 1]."""
    num_rows, num_keys = max(g.num_rows for g in groups), max(g.num_keys for g in groups)
    parts = key_parts(len(groups), num_rows, num_keys, torch.get_num_threads(), limits)
    fewest_keys = min(g.num_keys for g in groups)
    while parts > 1 and (parts - 1) * math.ceil(num_keys / parts) >= fewest_keys:
        parts -= 1  # a part of padding alone would have no largest score
    first = torch.tensor([[group.first_row] for group in groups])
    last = torch.tensor([[group.first_row + group.num_rows - 1] for group in groups])
    index = first + torch.arange(num_rows)
    query = gather_rows(rows, torch.minimum(index, last)).to(torch.float32)
    outs, sums = attend_to_keys(query, *_gathered(keys, [group.key_rows for group in groups], parts), scale, parts)
    index = index.masked_fill_(index > last, rows.shape[0]).flatten()
    out.index_copy_(0, index, outs.flatten(0, 1).to(out.dtype))
    lse.index_copy_(0, index, sums.flatten())


def _gathered(keys: KeyTable, lists: Sequence[Tensor], parts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys [G, n, D], values [G, n, Dv] and bias [G, n] (None: zeros) of lists, padded to one multiple of ``parts``."""
    if len(lists) == 1 and lists[0].shape[0] % parts == 0:
        run = keys.run_of_tokens(lists[0])
        if run is not None:
            return run[0].unsqueeze(0), run[1].unsqueeze(0), None
    index = torch.nn.utils.rnn.pad_sequence(list(lists), batch_first=True, padding_value=keys.padding_row)
    index = pad(index, (0, -index.shape[1] % parts), value=keys.padding_row)
    key, value = keys.gather(index)
    unpadded = all(rows.shape[0] == index.shape[1] for rows in lists)
    return key, value, None if unpadded and not keys.num_means else keys.bias[index]


def key_parts(num_groups: int, num_rows: int, num_keys: int, num_threads: int, limits: Mapping[str, int]) -> int:
    """Into how many equal parts to cut the keys so that every thread has as much to do.

    limits: MIN_KEYS_PER_PART, keys below which merging a part costs more than an idle core; MIN_IDLE_PAIRS, (query,
    key) pairs that threads could compute while they idle below which a merge costs more than it saves.
    """
    # Rows per unit of work in ATen's flash attention, by number of query rows. Threads get runs of units.
    rows_per_unit = 256 if num_rows >= 768 else 64 if num_rows >= 192 else 32
    units_per_group = math.ceil(num_rows / rows_per_unit)
    whole_groups, units = divmod(math.ceil(num_groups * units_per_group / num_threads), units_per_group)
    longest = whole_groups * num_rows + min(units * rows_per_unit, num_rows)
    if (longest * num_threads - num_groups * num_rows) * num_keys <= limits["MIN_IDLE_PAIRS"]:
        return 1
    return max(1, min(num_threads, num_keys // limits["MIN_KEYS_PER_PART"]))


def attend_to_keys(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """Attention of query [G, m, D] over n keys each, in ``parts`` equal runs: out [G, m, Dv], lse [G, m]; all float32.

    ``bias`` [G, n] is added to the scaled scores of each key. n must be a multiple of ``parts``.
    """
    if key.shape[1] < MIN_FUSED_KEYS:
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
        scores = scores if bias is None else scores.add_(bias.unsqueeze(1))
        return torch.softmax(scores, dim=2) @ value, torch.logsumexp(scores, dim=2)
    head_dim, value_dim = query.shape[2], value.shape[2]
    width = max(head_dim, value_dim)  # the kernel wants equal widths: zeros change neither scores nor sums
    if head_dim < width:
        query, key = (pad(tokens, (0, width - head_dim)) for tokens in (query, key))
    if value_dim < width:
        value = pad(value, (0, width - value_dim))
    num_rows = query.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(1).expand(-1, parts, -1, -1),
        key.unflatten(1, (parts, -1)),
        value.unflatten(1, (parts, -1)),
        attn_mask=None if bias is None else bias.unflatten(1, (parts, 1, -1)).expand(-1, -1, num_rows, -1),
        scale=scale,
    )
    out = out[..., :value_dim]
    return (out[:, 0], lse[:, 0]) if parts == 1 else merge_partial_softmax(out.transpose(0, 1), lse.transpose(0, 1))


def merge_partial_softmax(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the out [p, ..., m, Dv] and lse [p, ..., m] of each."""
    largest = lse.amax(dim=0)
    weights = (lse - largest).exp_()
    total = weights.sum(dim=0)
    weights /= total
    merged = out[0] * weights[0].unsqueeze(-1)
    for part in range(1, out.shape[0]):
        merged.addcmul_(out[part], weights[part].unsqueeze(-1))
    return merged, total.log_().add_(largest)
