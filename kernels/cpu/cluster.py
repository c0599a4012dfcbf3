"""k-means, counting order, permutation and cluster means on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg2_compile.kernels.tuning.lookup import tuned


# -------------------------------------------------------------------------------------------------------------- k-means
def kmeans(
    x: Tensor, centroids: Tensor, seeded: Tensor, iters: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm, head by head; see ``ops.kmeans``."""
    batch, heads, num_tokens, _ = x.shape
    num_clusters = centroids.shape[2]
    starts_given = bool(seeded)
    labels = x.new_zeros(batch, heads, num_tokens, dtype=torch.int32)
    means = torch.empty_like(centroids, memory_format=torch.contiguous_format)
    sizes = x.new_zeros(batch, heads, num_clusters, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            members = None if valid is None else valid[b, h if valid.shape[1] > 1 else 0].nonzero().squeeze(-1)
            # Only valid tokens take part: whatever padding holds (NaN included) is never read.
            # Contiguous rows: a model's heads are strided views, whose sums by cluster take eight times as long.
            tokens = (x[b, h] if members is None else x[b, h].index_select(0, members)).to(torch.float32).contiguous()
            start = centroids[b, h] if starts_given else _spread_seeds(tokens, num_clusters)
            head_labels, means[b, h], sizes[b, h] = _lloyd(tokens, start, iters)
            if members is None:
                labels[b, h] = head_labels
            else:
                labels[b, h, members] = head_labels.to(torch.int32)
    return labels, means, sizes


def _spread_seeds(tokens: Tensor, num_clusters: int) -> Tensor:
    """The middle token of each of C equal stretches of the tokens [n, D]; zeros where there is no token at all."""
    if tokens.shape[0] == 0:
        return tokens.new_zeros(num_clusters, tokens.shape[1])
    rank = (2 * torch.arange(num_clusters) + 1) * tokens.shape[0] // (2 * num_clusters)
    return tokens.index_select(0, rank)


def _lloyd(tokens: Tensor, centroids: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assign then update, ``iters`` times, for float32 tokens [n, D]: labels int64 [n], centroids [C, D], sizes
    [C]."""
    previous: Tensor | None = None
    for _ in range(iters):
        labels = _nearest_centroid(tokens, centroids)
        if previous is not None and torch.equal(labels, previous):
            break  # a fixed point: every further iteration would give the same
        centroids, sizes = _member_means(tokens, labels, centroids)
        previous = labels
    return labels, centroids, sizes


def _nearest_centroid(tokens: Tensor, centroids: Tensor) -> Tensor:
    """argmax of x.c - |c|^2 / 2, tile by tile. A non-finite centroid is chosen by nobody."""
    negative_half_norms = centroids.square().sum(dim=-1) / -2
    usable = negative_half_norms.isfinite()
    if not bool(usable.all()):
        centroids = torch.where(usable.unsqueeze(-1), centroids, 0.0)
        negative_half_norms = torch.where(usable, negative_half_norms, -math.inf)
    num_tokens, num_clusters = tokens.shape[0], centroids.shape[0]
    # Floats of one [tokens, clusters] tile: small enough that the arg-max finds in cache what the product has just left
    # there, large enough that threads rarely wait for each other between the two.
    scores_per_tile = tuned("cpu_kmeans", tokens.device, tokens.dtype, tokens.shape[1], num_tokens)["SCORES_PER_TILE"]
    tile = max(64, scores_per_tile // num_clusters)
    scores = tokens.new_empty(min(tile, num_tokens), num_clusters)
    labels = torch.empty(num_tokens, dtype=torch.int64)
    directions = centroids.t()
    for start in range(0, num_tokens, tile):
        rows = tokens[start : start + tile]
        tile_scores = scores[: rows.shape[0]]
        torch.addmm(negative_half_norms, rows, directions, out=tile_scores)
        torch.argmax(tile_scores, dim=-1, out=labels[start : start + tile])
    return labels


def _member_means(tokens: Tensor, labels: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the members of each cluster, the previous centroid where there is none; and the sizes."""
    sizes = torch.bincount(labels, minlength=previous.shape[0])
    sums = torch.zeros_like(previous).index_add_(0, labels, tokens)
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return torch.where((sizes > 0).unsqueeze(-1), means, previous), sizes


# ------------------------------------------------------------------------------------------------ order and permutation
def cluster_order(
    labels: Tensor, num_clusters: int, start: int, num_tokens: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stable counting sort of tokens by block; see ``ops.cluster_order``."""
    check_labels(labels, num_clusters)
    batch, heads, video_tokens = labels.shape
    blocks = labels.new_full((batch, heads, num_tokens), num_clusters)
    blocks[..., start : start + video_tokens] = labels
    if valid is not None:
        blocks.masked_fill_(~valid, num_clusters + 1)
    order = torch.argsort(blocks, dim=-1, stable=True).to(torch.int32)
    num_blocks = num_clusters + 2
    head_starts = num_blocks * torch.arange(batch * heads).view(batch, heads, 1)
    sizes = torch.bincount((blocks + head_starts).flatten(), minlength=batch * heads * num_blocks)
    offsets = torch.zeros(batch, heads, num_blocks + 1, dtype=torch.int32)
    torch.cumsum(sizes.view(batch, heads, num_blocks), dim=-1, dtype=torch.int32, out=offsets[..., 1:])
    return order, offsets


def check_labels(labels: Tensor, num_clusters: int) -> None:
    """Labels index memory: a wrong one must be an error here, not a crash there."""
    if labels.numel() > 0 and (int(labels.min()) < 0 or int(labels.max()) >= num_clusters):
        raise ValueError(
            f"svg2::cluster_order: labels lie in [{int(labels.min())}, {int(labels.max())}]; "
            f"valid: [0, {num_clusters}) for num_clusters = {num_clusters}"
        )


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Row r of the result is token order[r]; see ``ops.permute_tokens``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            torch.index_select(x[b, h], 0, order[b, h], out=out[b, h])
    return out


def gather_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens [n, D] by index [...]: [..., D]. Several times as fast as ``tokens[index]``."""
    return tokens.index_select(0, index.flatten()).unflatten(0, index.shape)


def unpermute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token order[r] of the result is row r, laid out token by token; see ``ops.unpermute_tokens``."""
    batch, heads, num_tokens, head_dim = x.shape
    out = x.new_empty(batch, num_tokens, heads, head_dim).transpose(1, 2)
    index = order.to(torch.int64)
    for b in range(batch):
        for h in range(heads):
            out[b, h].index_copy_(0, index[b, h], x[b, h])
    return out


def by_cluster(
    query: Tensor, key: Tensor, value: Tensor, q_order: Tensor | None, k_order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention reads, in the order of clusters; without an order it is there already."""
    if k_order is not None:
        key, value = permute_tokens(key, k_order), permute_tokens(value, k_order)
    if q_order is not None:
        query = permute_tokens(query, q_order)
    return query, key, value


def by_token(out: Tensor, lse: Tensor, q_order: Tensor | None) -> tuple[Tensor, Tensor]:
    """What attention returns, in the order that its queries had before :func:`by_cluster`."""
    if q_order is None:
        return out, lse
    return unpermute_tokens(out, q_order), torch.empty_like(lse).scatter_(2, q_order.to(torch.int64), lse)


def cluster_means(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of the rows of each cluster; see ``ops.cluster_means``."""
    batch, heads, _, head_dim = x.shape
    num_clusters = offsets.shape[2] - 3
    means = x.new_zeros(batch, heads, num_clusters, head_dim, dtype=torch.float32)
    sizes = offsets.diff(dim=-1)[..., :num_clusters]
    for b in range(batch):
        for h in range(heads):
            clustered = x[b, h, : int(offsets[b, h, num_clusters])].to(torch.float32)
            labels = torch.repeat_interleave(torch.arange(num_clusters), sizes[b, h])
            means[b, h].index_add_(0, labels, clustered)
    return means / sizes.clamp(min=1).unsqueeze(-1)
