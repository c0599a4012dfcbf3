"""Every op in Triton, for NVIDIA GPUs (sm_80 and newer) and AMD's that Triton compiles for. A facade over this
folder."""

# ruff: noqa: F401  (what is imported here is what the ops find)

from svg2_compile.kernels.triton.attention import block_density, block_sparse_attention, first_order_attention
from svg2_compile.kernels.triton.error import block_estimates
from svg2_compile.kernels.triton.kmeans import kmeans
from svg2_compile.kernels.triton.means import cluster_means, cluster_variances
from svg2_compile.kernels.triton.members import farthest_members
from svg2_compile.kernels.triton.order import cluster_order
from svg2_compile.kernels.triton.permute import permute_tokens, unpermute_tokens
from svg2_compile.kernels.triton.pool import select_blocks_of_layer
from svg2_compile.kernels.triton.sampled_error import sampled_error
from svg2_compile.kernels.triton.select import select_blocks, select_blocks_by_error
from svg2_compile.kernels.triton.terms import first_order_estimates, first_order_terms
