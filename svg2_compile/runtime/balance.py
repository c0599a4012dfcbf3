"""Which heads go to which rank: those that keep many blocks and those that keep few, so that no rank waits for another.

With one budget for all heads of a layer, some keep several times as many blocks as others. After the first sparse step
of a video the ranks tell each other the densities, heads are sorted by them and dealt like a snake (to ranks 0 1 2 3 3
2 1 0 ...; xDiT deals the heads of SpargeAttn so), and the centroids follow their heads. For the rest of the video the
order stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg2_compile.passes.graph.collectives import process_group
from svg2_compile.passes.hoist_centroids import OrderSlot, StateSpec

__all__ = ["dealt", "initial_orders", "rebalanced"]


def initial_orders(spec: StateSpec) -> list[Tensor]:
    """The heads as they come: int64 [H] for every balanced site."""
    return [torch.arange(slot.heads, device=spec.device) for slot in spec.orders]


def dealt(loads: Tensor, ranks: int) -> Tensor:
    """Deal heads to ranks, the heaviest first, back and forth.

    Args:
        loads: [..., H]. ranks: divides H.

    Returns:
        int64 [..., H], of which the r-th part of H / ranks are rank r's heads.
    """
    each = loads.shape[-1] // ranks
    turn, place = torch.arange(each, device=loads.device), torch.arange(ranks, device=loads.device)[:, None]
    back = turn % 2 == 1
    drawn = turn * ranks + torch.where(back, ranks - 1 - place, place)  # [ranks, each]
    return loads.argsort(dim=-1, descending=True, stable=True)[..., drawn.flatten()]


def rebalanced(
    spec: StateSpec, centroids: Sequence[Tensor], densities: Sequence[Tensor], orders: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The centroids of the heads that this rank gets from now on, and the new orders. Every rank has to call it.

    Args:
        centroids: float32 [B, H / W, C, D] for every slot of ``spec``. densities: [B, H / W] for every site that has
        one. orders: those that the densities belong to.
    """
    result, new_orders = list(centroids), []
    for slot, order in zip(spec.orders, orders, strict=True):
        density = densities[spec.density_sites.index(slot.site_index)].float().mean(0)
        loads = torch.empty(slot.heads, device=density.device)
        loads[order] = _of_all_ranks(slot, density[None])[0]
        new = dealt(loads, slot.ranks)
        rank = torch.distributed.get_rank(process_group(slot.group))
        own = torch.argsort(order)[new].chunk(slot.ranks)[rank]
        for index, state in enumerate(spec.slots):
            if state.site_index == slot.site_index and state.role != "budget":
                result[index] = _of_all_ranks(slot, centroids[index])[:, own]
        new_orders.append(new)
    return result, new_orders


def _of_all_ranks(slot: OrderSlot, own: Tensor) -> Tensor:
    """[B, H / W, ...] of every rank as [B, H, ...], in the order of the ranks."""
    heads_first = own.transpose(0, 1).contiguous()
    gathered = heads_first.new_empty((slot.heads, *heads_first.shape[1:]))
    torch.distributed.all_gather(list(gathered.chunk(slot.ranks)), heads_first, group=process_group(slot.group))
    return gathered.transpose(0, 1)
