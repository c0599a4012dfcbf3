"""Every native op once with several threads: what `make sanitize` runs under the thread sanitizer.

    python -m tests.kernels.cpu.exercise_threads

The suite itself would take too long there. Results are compared with those of one thread.
"""

from __future__ import annotations

import torch

from svg2_compile.kernels.cpu.native import calls
from svg2_compile.kernels.cpu.native import implementation as native

TOKENS, HEADS, DIM, Q_CLUSTERS, K_CLUSTERS = 400, 2, 24, 6, 20


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rewritten attention from end to end; its results by name."""
    cold, scale = torch.tensor(False), DIM**-0.5
    q_labels, q_means, q_sizes = native.kmeans(query, torch.zeros(1, HEADS, Q_CLUSTERS, DIM), cold, 2)
    k_labels, k_means, _ = native.kmeans(key, torch.zeros(1, HEADS, K_CLUSTERS, DIM), cold, 2)
    q_order, q_offsets = native.cluster_order(q_labels, Q_CLUSTERS, 0, TOKENS)
    k_order, k_offsets = native.cluster_order(k_labels, K_CLUSTERS, 0, TOKENS)
    k, v = native.permute_tokens(key, k_order), native.permute_tokens(value, k_order)
    means = (q_means, k_means, native.cluster_means(v, k_offsets))
    variances = native.cluster_variances(query, q_order, q_offsets, q_means)
    mass, error, of_all = native.first_order_estimates(k, v, k_offsets, *means, scale)
    far_members = native.farthest_members(query, q_order, q_offsets, q_means, 8)
    selection = (mass, error, variances, k_means, q_sizes, k_offsets, scale, torch.tensor(0.3))
    block_map = native.select_blocks_of_layer(*selection, far_members)
    terms = native.first_order_terms(k, v, k_offsets, *means, mass, block_map, scale, of_all)
    blocks = (q_offsets, k_offsets, block_map, scale)
    out, lse = native.first_order_attention(query, k, v, *blocks, *means, mass, *terms, q_order)
    back = native.unpermute_tokens(k, k_order)
    return {"out": out, "lse": lse, "residual": terms[0], "slope": terms[1], "block_map": block_map, "key": back}


def main() -> None:
    torch.manual_seed(0)
    calls.OPERATIONS_PER_THREAD = 1  # small as they are, they take all threads
    tokens = [torch.randn(1, HEADS, TOKENS, DIM) for _ in range(3)]
    results = {}
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results[threads] = attend(*tokens)
    torch.testing.assert_close(results[4], results[1], rtol=0, atol=0)
    print(f"{len(results[1])} results are the same with 1 and with 4 threads")


if __name__ == "__main__":
    main()
