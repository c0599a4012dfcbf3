"""How evenly heads lie on the ranks of Ulysses: the largest rank's share of the selected blocks, over the mean.

    python -m bench.distributed.balance            JSON in bench/results/distributed_balance.json
    python -m bench.distributed.balance --quick    a shorter video, nothing written

The trained small model (6 heads, 8 layers) samples a video in one process, and the density of every head in every step
is noted. What a rank has to do is the sum over its heads; all wait for the rank with the most. Compared are the heads
as they come, and as ``balance_heads`` deals them for the rest of a video after its first sparse step.

    top_p        every head keeps what reaches a softmax mass, whoever has it: the densities are those of any rank
    one pool     one density for all heads of a layer. On several ranks each has a pool of its own, so that all ranks
                 have to do the same; here it says how unequal the heads are that one pool serves

Checked first: every order has every head once, and the loads of all ranks sum to those of all heads.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import svg2_compile
from bench.common import markdown, write_results
from svg2_compile.minidit.model import VideoSize, load_model, make_scheduler, sample_videos
from svg2_compile.minidit.prompts import random_prompt
from svg2_compile.runtime.balance import dealt

RANKS = (2, 3)
WAYS: dict[str, dict[str, Any]] = {
    "top_p=0.9": {"top_p": 0.9, "compensation": "none", "dense_layers": 0},
    "one pool, density 0.10": {"dense_layers": 0},
}


def densities(options: dict[str, Any], size: VideoSize, steps: int) -> Tensor:
    """The density of every head: [sparse steps, layers, heads], of the conditional branch."""
    model, scheduler = load_model(), make_scheduler(size.tokens)
    settings = {"inner_backend": "eager", "min_tokens": 0, "dense_steps": 1, **options}
    with svg2_compile.enable(model, scheduler=scheduler, **settings) as enabled:
        prompt = random_prompt(torch.Generator().manual_seed(0))
        sample_videos(model, [prompt], [0], size, steps, scheduler=scheduler)
        runs = [run for run in enabled.report().runs if run.graph == "sparse" and run.context == 0]
    found = [(run.step, run.density_per_head) for run in runs]
    present = sorted({step for step, _ in found})
    return torch.stack([torch.tensor([d[0] for s, d in found if s == step and d is not None]) for step in present])


def largest_share(loads: Tensor, ranks: int) -> Tensor:
    """The load of the rank with the most over the mean of the ranks; loads: [..., heads] in the order of the ranks."""
    shares = loads.unflatten(-1, (ranks, -1)).sum(-1)
    if not torch.allclose(shares.sum(-1), loads.sum(-1)):
        raise AssertionError("the loads of the ranks do not sum to those of the heads")
    return shares.amax(-1) / shares.mean(-1)


def compare(name: str, found: Tensor) -> list[dict[str, Any]]:
    """Both ways to spread the heads, in the steps after the first sparse one."""
    rows = []
    for ranks in RANKS:
        orders = dealt(found[0], ranks)
        if not (orders.sort(-1).values == torch.arange(found.shape[-1])).all():
            raise AssertionError("an order does not have every head once")
        later = found[1:]
        spread = {"as they come": later, "balanced": later.gather(-1, orders.expand_as(later))}
        for way, loads in spread.items():
            share = largest_share(loads, ranks)
            row = {"selection": name, "ranks": ranks, "heads": way, "cases": share.numel()}
            rows.append({**row, "mean_share": round(share.mean().item(), 3), "worst": round(share.max().item(), 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter video, nothing written")
    quick = parser.parse_args().quick
    size, steps = (VideoSize(4, 64, 64), 4) if quick else (VideoSize(8, 64, 64), 4)
    results = [row for name, options in WAYS.items() for row in compare(name, densities(options, size, steps))]
    columns = ("selection", "ranks", "heads", "cases", "mean_share", "worst")
    print(markdown(columns, [[str(row[column]) for column in columns] for row in results]))
    if not quick:
        path = write_results("distributed_balance", results, tokens=size.tokens, steps=steps)
        print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
