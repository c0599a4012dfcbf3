"""Draw docs/img/overview.png: an attention over clustered tokens in token order, permuted, selected and compensated.

python -m bench.overview_picture
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from bench.clustered_inputs import clustered_inputs
from bench.common import IMAGES
from bench.rewritten import Rewritten, Settings, make_inputs
from bench.shape import Shape
from svg2_compile.settings.config import Svg2Config

mpl.use("Agg")
from matplotlib import pyplot as plt

PICTURE = IMAGES / "overview.png"
SHAPE = Shape("overview", 1, 900, 0, 16, num_q_clusters=16, num_k_clusters=48, spread=2.4, dtype=torch.float32)


def compensated_weights(call: Rewritten, query: Tensor, selected: Tensor, exact: Tensor) -> Tensor:
    """What keys weigh [N, N], rows and columns by cluster: selected ones exactly, every skipped cluster as one key."""
    clusters = slice(0, SHAPE.num_k_clusters)
    rows, columns = _blocks(call)
    away = query[0, 0][call.q_order[0, 0].long()] - call.q_means[0, 0][rows]
    masses = SHAPE.scale * away @ call.k_means[0, 0].T + call.log_mass[0, 0][rows][:, clusters]
    sizes = call.k_offsets[0, 0].diff()[clusters]
    stand_ins = (masses - sizes.log())[:, columns].exp()
    weights = torch.where(selected, exact, stand_ins)
    return weights / weights.sum(dim=1, keepdim=True)


def draw() -> Path:
    """Compute and save the picture; return its path."""
    density = Svg2Config().selection()[1]
    assert density is not None
    inputs = make_inputs(SHAPE, clustered_inputs(SHAPE))
    query, key, value = inputs[:3]
    call = Rewritten(SHAPE, inputs, Settings(density, first_order=True))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    error = float((call.out - dense).norm() / dense.norm())

    exponentials = (query @ key.transpose(-1, -2) * SHAPE.scale).exp()[0, 0]
    weights = exponentials / exponentials.sum(dim=1, keepdim=True)
    q_order, k_order = call.q_order[0, 0].long(), call.k_order[0, 0].long()
    permuted = weights[q_order][:, k_order]
    rows, columns = _blocks(call)
    selected = call.block_map[0, 0][rows][:, columns]
    recall = (permuted * selected).sum(-1).mean().item()
    compensated = compensated_weights(call, query, selected, exponentials[q_order][:, k_order])

    panels = [
        ("1  attention, tokens in order", weights, None),
        ("2  permuted by k-means clusters", permuted, None),
        (f"3  selected: {float(call.densities().mean()):.0%} of pairs, {recall:.0%} of mass", permuted, selected),
        (f"4  the rest as one key a cluster: error {error:.1%}", compensated, None),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.3), constrained_layout=True)
    for axis, (title, values, mask) in zip(axes, panels, strict=True):
        shown = (values * SHAPE.num_tokens).clamp(min=1e-3).log10()
        image = shown if mask is None else torch.where(mask, shown, torch.nan)
        axis.set_facecolor("white")
        axis.imshow(image, cmap="magma_r", vmin=-1.5, vmax=1.5, interpolation="nearest", aspect="equal")
        axis.set(title=title, xlabel="keys", ylabel="queries", xticks=[], yticks=[])
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    return PICTURE


def _blocks(call: Rewritten) -> tuple[Tensor, Tensor]:
    """The block of every query and of every key, by cluster."""
    sizes = (call.q_offsets[0, 0].diff(), call.k_offsets[0, 0].diff())
    q_blocks, k_blocks = (torch.arange(len(size)).repeat_interleave(size.long()) for size in sizes)
    return q_blocks, k_blocks


if __name__ == "__main__":
    print(draw())
