"""Other libraries on the same work. One that is not installed, or does not run here, is "not measured", with the
reason."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.rewritten import Rewritten

__all__ = ["FlexPeer", "NotMeasured", "flash_kmeans", "flashinfer_attention", "make_flex"]

BLOCK = 128  # FlexAttention's blocks of queries and keys


class NotMeasured(Exception):
    """Something that cannot be measured here, with the reason; not a failure."""


def _need(module: str) -> Any:
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotMeasured(f"{package} is not installed")
    return importlib.import_module(module)


# -------------------------------------------------------------------------------------------------------- FlexAttention


@dataclass(frozen=True)
class FlexPeer:
    """FlexAttention over the first ``num_tokens`` tokens, whole blocks of 128, at ``density``."""

    run: Callable[[], Tensor]
    num_tokens: int
    density: float
    blocks: Tensor  # bool [1, H, Q blocks, K blocks]: which blocks are computed

    def exact_rows(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
        """What query ``tokens`` should give, in float64: [H, len(tokens), D]."""
        rows = []
        for head in range(query.shape[1]):
            keys, values = (x[0, head, : self.num_tokens].double() for x in (key, value))
            scores = (query[0, head, tokens].double() @ keys.T) * query.shape[-1] ** -0.5
            seen = self.blocks[0, head, tokens // BLOCK].repeat_interleave(BLOCK, dim=-1)
            rows.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ values)
        return torch.stack(rows)


def make_flex(query: Tensor, key: Tensor, value: Tensor, density: float) -> FlexPeer:
    """Random blocks, as many in every row, with the asked density. Tokens that fill no block are left out.

    Compiled on a GPU. On a CPU it runs as plain operators, which ignore the lists of blocks and ask the mask.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads, num_blocks = query.shape[1], query.shape[2] // BLOCK
    num_tokens = num_blocks * BLOCK
    kept = max(1, round(density * num_blocks))
    generator = torch.Generator(device=query.device).manual_seed(0)
    ranks = torch.rand(1, heads, num_blocks, num_blocks, generator=generator, device=query.device).argsort(dim=-1)
    indices = ranks.to(torch.int32)
    counts = torch.full((1, heads, num_blocks), kept, dtype=torch.int32, device=query.device)
    blocks = torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, ranks[..., :kept], True)

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return blocks[0, head, query_index // BLOCK, key_index // BLOCK]

    # All blocks are full ones, for which the mask is never asked.
    block_mask = BlockMask.from_kv_blocks(
        *(torch.zeros_like(counts), indices, counts, indices),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(num_tokens, num_tokens),
        compute_q_blocks=False,
    )
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False) if query.is_cuda else flex_attention
    tokens = [x[:, :, :num_tokens].contiguous() for x in (query, key, value)]
    return FlexPeer(lambda: compiled(*tokens, block_mask=block_mask), num_tokens, kept / num_blocks, blocks)


# ----------------------------------------------------------------------------------------------------------- flashinfer


def flashinfer_attention(rewritten: Rewritten) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """flashinfer's VariableBlockSparseAttentionWrapper on the very blocks of ``rewritten``: plan, and run.

    run returns [H, N, D], permuted. Raises NotMeasured where flashinfer is missing or cannot build its kernels.
    """
    sparse = _need("flashinfer.sparse")
    shape = rewritten.shape
    if shape.context_tokens:
        raise NotMeasured("only compared without context tokens")
    from svg2_compile.kernels import ops

    query = ops.permute_tokens(rewritten.inputs.query, rewritten.q_order)
    tokens = [x[0].contiguous() for x in (query, rewritten.k_permuted, rewritten.v_permuted)]
    sizes = [offsets[0].diff(dim=-1)[:, :-2].contiguous() for offsets in (rewritten.q_offsets, rewritten.k_offsets)]
    block_map = rewritten.block_map[0, :, :-2, :-2].contiguous()
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace, backend="auto")

    def plan() -> None:
        heads = (shape.num_heads, shape.num_heads, shape.head_dim)
        wrapper.plan(block_map, *sizes, *heads, sm_scale=shape.scale, non_blocking=False, q_data_type=shape.dtype)

    def run() -> Tensor:
        out: Tensor = wrapper.run(*tokens)
        return out

    try:
        plan()
        run()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotMeasured(f"does not build or run here: {type(error).__name__}: {str(error)[:300]}") from error
    return plan, run


# --------------------------------------------------------------------------------------------------------- flash-kmeans


def flash_kmeans(x: Tensor, centroids: Tensor) -> Callable[[int], Tensor]:
    """flash-kmeans on contiguous x [1, H, N, D] from float32 centroids [1, H, C, D]: iterations -> labels [H, N].

    It reads its convergence back to the host after every iteration; a tolerance of -1 never ends it early.
    """
    library = _need("flash_kmeans")
    if not x.is_cuda:
        raise NotMeasured("flash-kmeans needs a GPU")
    tokens, start = x[0], centroids[0].to(x.dtype)

    def run(iters: int) -> Tensor:
        limits = {"max_iters": iters, "tol": -1.0}
        labels: Tensor = library.batch_kmeans_Euclid(tokens, start.shape[1], init_centroids=start, **limits)[0]
        return labels

    return run
