"""What Wan 14B costs on several GPUs under Ulysses, COMPUTED FROM A FORMULA: nothing here was measured.

    python -m bench.distributed.cost

One call of the model on W ranks, of N tokens, width C, H heads, L layers; every rank has N / W tokens, and in
attention all N of them for H / W heads:

    linear        (8 C^2 + 4 C F + cross attention) N / W FLOPs in each layer
    exchange      4 tensors (query, key, value, output) of N C / W elements, of which (W - 1) / W leave the rank
    dense         4 N^2 C / W FLOPs
    sparse        passes/cost_model.py with H / W heads: k-means, permutation, selection, the selected blocks
    imbalance     with top_p, all ranks wait for that with the largest share of the selected blocks; with one budget
                  for the heads of a rank (the default) they have equally much to do
    agreement     one exchange of a few hundred bytes for each video and graph: left out

Throughputs of the GPU are those of the cost model's sm_90 profile, bandwidths those below: assumptions all of them.
A degree has to divide the heads (40), and the tokens; what is left of the GPUs runs guidance branches and other videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.common import markdown, write_results
from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS
from svg2_compile.passes.cost_model import CostInputs, dense_seconds, sparse_seconds
from svg2_compile.passes.device_profile import profile_named

LAYERS, HEADS, HEAD_DIM, FEED_FORWARD, TEXT = 40, 40, 128, 13_824, 512
WIDTH = HEADS * HEAD_DIM
VIDEOS = {"720p, 81 frames": 21 * 45 * 80, "720p, 321 frames": 81 * 45 * 80}
GPUS = (1, 8, 16, 32, 40, 64)
GPUS_IN_A_NODE = 8
LINEAR_FLOPS = 5.0e14
NODE_BANDWIDTH = 3.5e11  # bytes/s that a GPU sends to others of its node
NETWORK_BANDWIDTH = 4.0e10  # bytes/s that a GPU sends to other nodes
LATENCY = 3e-5  # seconds of one exchange
DENSITY = 0.10
STEP_ITERS = 1
IMBALANCE = {"even": 1.0, "largest share 1.3": 1.3}
BYTES = 2
GUIDANCE_BRANCHES = 2


@dataclass(frozen=True)
class Layout:
    """How GPUs are used: ranks of Ulysses, guidance branches side by side, videos side by side."""

    ulysses: int
    branches: int
    videos: int


def layout(gpus: int, tokens: int) -> Layout:
    """The layout with the shortest video: the largest product of a degree and branches that divides the GPUs."""
    degrees = [d for d in range(1, gpus + 1) if HEADS % d == 0 and tokens % d == 0]
    choices = [(d * b, d, b) for d in degrees for b in (1, GUIDANCE_BRANCHES) if gpus % (d * b) == 0]
    product, degree, branches = max(choices)
    return Layout(degree, branches, gpus // product)


def exchange_seconds(tokens: int, ranks: int) -> float:
    """Four exchanges of one layer: a rank sends (W - 1) / W of its tokens, first to its own node."""
    if ranks == 1:
        return 0.0
    own = tokens * WIDTH * BYTES / ranks
    near = min(ranks, GPUS_IN_A_NODE) - 1
    far = ranks - 1 - near
    return 4 * (own / ranks * (near / NODE_BANDWIDTH + far / NETWORK_BANDWIDTH) + LATENCY)


def seconds(tokens: int, ranks: int, density: float | None, imbalance: float = 1.0) -> dict[str, float]:
    """One call of the model, by its parts. density: None for dense attention."""
    _, profile = profile_named("cuda:sm_90")
    cost = CostInputs(
        video=tokens,
        context=0,
        groups=HEADS // ranks,
        head_dim=HEAD_DIM,
        num_q_clusters=QUERY_CLUSTERS.count(tokens),
        num_k_clusters=KEY_CLUSTERS.count(tokens),
        iters=STEP_ITERS,
        density=density or 1.0,
        compensation=True,
        error_routing=True,
        first_order=True,
    )
    cross = 4 * WIDTH**2 + 4 * TEXT * WIDTH
    linear = tokens * (8 * WIDTH**2 + 4 * WIDTH * FEED_FORWARD + cross) / ranks / LINEAR_FLOPS
    if density is None:
        attention, clustering = float(dense_seconds(cost, profile)), 0.0
    else:
        blocks = 4 * cost.groups * density * tokens**2 * HEAD_DIM / profile.sparse_flops
        attention = blocks * imbalance
        clustering = float(sparse_seconds(cost, profile)) - blocks
    parts = {"linear": linear, "exchange": exchange_seconds(tokens, ranks)}
    parts |= {"attention": attention, "clustering and selection": clustering}
    return {name: LAYERS * value for name, value in parts.items()}


def rows() -> list[dict[str, Any]]:
    """Every video on every number of GPUs: dense, and sparse with heads evenly and unevenly spread."""
    result = []
    for video, tokens in VIDEOS.items():
        for gpus in GPUS:
            chosen = layout(gpus, tokens)
            ways: dict[str, Any] = {"dense": (None, 1.0)}
            ways |= {f"sparse, {name}": (DENSITY, factor) for name, factor in IMBALANCE.items()}
            for way, (density, factor) in ways.items():
                if chosen.ulysses == 1 and factor != 1.0:
                    continue
                parts = seconds(tokens, chosen.ulysses, density, factor)
                calls = GUIDANCE_BRANCHES // chosen.branches
                result.append(
                    {
                        "video": video,
                        "tokens": tokens,
                        "gpus": gpus,
                        "ulysses": chosen.ulysses,
                        "branches_side_by_side": chosen.branches,
                        "videos_side_by_side": chosen.videos,
                        "attention": way,
                        "step_seconds": calls * sum(parts.values()),
                        "call_seconds": {name: round(value, 4) for name, value in parts.items()},
                    }
                )
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown, milliseconds of one call of the model and seconds of one step."""
    header = ["video", "GPUs", "Ulysses x branches x videos", "attention", "linear", "exchange", "attend", "cluster"]
    lines = []
    for row in results:
        parts = [f"{1e3 * value:,.0f}" for value in row["call_seconds"].values()]
        used = f"{row['ulysses']} x {row['branches_side_by_side']} x {row['videos_side_by_side']}"
        lines.append([row["video"], str(row["gpus"]), used, row["attention"], *parts, f"{row['step_seconds']:.2f}"])
    return markdown([*header, "step, s"], lines)


def main() -> None:
    results = rows()
    assumptions = {
        "profile": "sm_90 of passes/cost_model.py",
        "linear_flops": LINEAR_FLOPS,
        "latency": LATENCY,
        "node_bandwidth": NODE_BANDWIDTH,
        "network_bandwidth": NETWORK_BANDWIDTH,
        "density": DENSITY,
    }
    path = write_results(
        "distributed_cost", results, kind="computed from a formula, nothing was measured", assumptions=assumptions
    )
    print(table(results))
    print(f"\nComputed from a formula, nothing was measured. Written to {path}")


if __name__ == "__main__":
    main()
