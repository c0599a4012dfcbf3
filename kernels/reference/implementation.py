"""The oracle: every op in plain PyTorch, written to be read next to the paper (SVG2, arXiv 2505.18875, section 4).

Readable before fast: loops over heads and blocks, sorts instead of thresholds, whole matrices of scores in chunks of
queries. No other implementation imports this folder. Every function has the signature of its op (see ``ops.py`` for
shapes and semantics) plus ``compute_dtype``, the precision of all arithmetic (float64 in tests, float32 otherwise).
"""

# ruff: noqa: F401  (what is imported here is what the ops find)

from svg2_compile.kernels.reference.attention import block_density, block_sparse_attention
from svg2_compile.kernels.reference.cluster import (
    cluster_means,
    cluster_order,
    kmeans,
    permute_tokens,
    unpermute_tokens,
)
from svg2_compile.kernels.reference.first_order import (
    first_order_attention,
    first_order_estimates,
    first_order_terms,
)
from svg2_compile.kernels.reference.pool import (
    block_estimates,
    cluster_variances,
    farthest_members,
    select_blocks_of_layer,
)
from svg2_compile.kernels.reference.sampled_error import sampled_error
from svg2_compile.kernels.reference.select import select_blocks, select_blocks_by_error
