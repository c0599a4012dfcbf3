"""Every op in Triton, for NVIDIA GPUs (sm_80 and newer) and AMD's that Triton compiles for. A facade over this
folder."""

# ruff: noqa: F401  (what is imported here is what the ops find)

from svg2_compile.kernels.triton.attention import block_density, block_sparse_attention
from svg2_compile.kernels.triton.kmeans import kmeans
from svg2_compile.kernels.triton.means import cluster_means
from svg2_compile.kernels.triton.order import cluster_order
from svg2_compile.kernels.triton.permute import permute_tokens, unpermute_tokens
from svg2_compile.kernels.triton.select import select_blocks, select_blocks_by_error
