"""The fast CPU implementation of every op, with the signatures of ``ops.py``.

It reads offsets and sizes on the host (free on the CPU), works head by head with workspaces linear in the number of
tokens, and leaves all parallelism to ATen's own intra-op threads. Arithmetic is float32 for every input dtype.
"""

# ruff: noqa: F401  (what is imported here is what the ops find)

from svg2_compile.kernels.cpu.attention import block_density, block_sparse_attention
from svg2_compile.kernels.cpu.cluster import cluster_means, cluster_order, kmeans, permute_tokens, unpermute_tokens
from svg2_compile.kernels.cpu.estimates import block_estimates, first_order_estimates
from svg2_compile.kernels.cpu.first_order import first_order_attention, first_order_terms
from svg2_compile.kernels.cpu.pool import cluster_variances, farthest_members, select_blocks_of_layer
from svg2_compile.kernels.cpu.sampled_error import sampled_error
from svg2_compile.kernels.cpu.select import select_blocks, select_blocks_by_error
