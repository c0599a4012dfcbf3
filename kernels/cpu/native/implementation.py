"""Every op on the CPU, in native code where there is some and in ATen calls where there is none."""

# ruff: noqa: F401  (what is imported here is what the ops find)

from svg2_compile.kernels.cpu.attention import block_density
from svg2_compile.kernels.cpu.native.attention import block_sparse_attention, first_order_attention
from svg2_compile.kernels.cpu.native.clusters import block_estimates, first_order_estimates, first_order_terms
from svg2_compile.kernels.cpu.native.kmeans import kmeans
from svg2_compile.kernels.cpu.native.select import select_blocks_by_error, select_blocks_of_layer
from svg2_compile.kernels.cpu.native.tokens import (
    cluster_means,
    cluster_order,
    cluster_variances,
    farthest_members,
    permute_tokens,
    unpermute_tokens,
)
from svg2_compile.kernels.cpu.sampled_error import sampled_error
from svg2_compile.kernels.cpu.select import select_blocks
