"""Draw docs/img/overview.png: an attention over clustered tokens in token order, permuted, and selected.

python -m bench.overview_picture
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch

from bench.clustered_inputs import clustered_inputs
from bench.common import IMAGES
from bench.shape import default_shape
from svg2_compile.kernels import ops

mpl.use("Agg")
from matplotlib import pyplot as plt

PICTURE = IMAGES / "overview.png"
TOP_P, NUM_Q_CLUSTERS, NUM_K_CLUSTERS, ITERS = 0.9, 8, 24, 10


def draw() -> Path:
    """Compute and save the picture; return its path."""
    query, key, _ = clustered_inputs(default_shape("overview", 1, 900, 16, 2.4, torch.float32))
    num_tokens, scale = query.shape[2], query.shape[3] ** -0.5
    cold, flag = torch.zeros(1, 1, NUM_Q_CLUSTERS, query.shape[3]), torch.tensor(False)
    q_labels, q_centroids, q_sizes = ops.kmeans(query, cold, flag, ITERS)
    k_labels, k_centroids, k_sizes = ops.kmeans(key, torch.zeros(1, 1, NUM_K_CLUSTERS, query.shape[3]), flag, ITERS)
    q_order, q_offsets = ops.cluster_order(q_labels, NUM_Q_CLUSTERS, 0, num_tokens)
    k_order, k_offsets = ops.cluster_order(k_labels, NUM_K_CLUSTERS, 0, num_tokens)
    block_map = ops.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, scale, TOP_P, 0.0)
    density = ops.block_density(q_offsets, k_offsets, block_map).item()

    weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)[0, 0]
    permuted = weights[q_order[0, 0].long()][:, k_order[0, 0].long()]
    rows = torch.repeat_interleave(torch.arange(NUM_Q_CLUSTERS + 2), q_offsets[0, 0].diff().long())
    columns = torch.repeat_interleave(torch.arange(NUM_K_CLUSTERS + 2), k_offsets[0, 0].diff().long())
    selected = block_map[0, 0][rows][:, columns]
    recall = (permuted * selected).sum(-1).mean().item()

    panels = [
        ("1  attention, tokens in order", weights, None),
        ("2  permuted by k-means clusters", permuted, None),
        (f"3  selected: {density:.0%} of pairs, {recall:.0%} of mass", permuted, selected),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), constrained_layout=True)
    for axis, (title, values, mask) in zip(axes, panels, strict=True):
        shown = (values * num_tokens).clamp(min=1e-3).log10()
        image = shown if mask is None else torch.where(mask, shown, torch.nan)
        axis.set_facecolor("white")
        axis.imshow(image, cmap="magma_r", vmin=-1.5, vmax=1.5, interpolation="nearest", aspect="equal")
        axis.set(title=title, xlabel="keys", ylabel="queries", xticks=[], yticks=[])
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    return PICTURE


if __name__ == "__main__":
    print(draw())
