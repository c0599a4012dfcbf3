"""Small models that spell one self-attention in many ways, their graphs, and the graphs rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from svg2_compile.passes.attention.find import find_attention
from svg2_compile.passes.canonical import canonical_sites, erase_unused
from svg2_compile.passes.decide_sites import decide_sites
from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.sites import Site, SitePolicy, Skip
from svg2_compile.passes.sparsify import SparseSite, SparsityPolicy, sparsify
from svg2_compile.passes.token_layout import analyse_token_layout

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM
DIALECTS = ("dynamo", "exported", "decomposed")

SITES = SitePolicy(
    min_tokens=0,
    dense_layers=0,
    num_q_clusters=3,
    num_k_clusters=5,
    step_iters=2,
    top_p=1.0,
    density=None,
    min_k_ratio=0.0,
    compensation="none",
    routing="score",
)
KEEP_ALL = SparsityPolicy(
    top_p=1.0,
    min_k_ratio=0.0,
    density=None,
    init_iters=2,
    compensation="none",
    routing="score",
    budget="row",
    collect_stats=False,
    workspace_mb=256,
)


class SelfAttention(nn.Module):
    """[B, N, DIM] -> [B, N, DIM] around ``attend(query, key, value, mask)`` on [B, H, N, D] tensors."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = self.attend(query, key, value) if mask is None else self.attend(query, key, value, mask)
        return self.out(attended.transpose(1, 2).flatten(2))


def model_of(attend: Callable[..., torch.Tensor]) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(attend).eval()


def video(batch: int = 2, tokens: int = 21) -> torch.Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(1))


def dynamo_graph(model: nn.Module, *inputs: Any, **compile_options: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and the inputs that it calls it with."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            captured.append((gm, list(args)))
            return gm(*args)

        return run

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **compile_options)(*inputs)
    return captured[0]


def exported_graph(
    model: nn.Module, *inputs: Any, decomposed: bool, strict: bool = False
) -> tuple[fx.GraphModule, list[Any]]:
    """The ATen graph of torch.export, and the inputs to call it with."""
    with torch.no_grad():
        program = torch.export.export(model, inputs, strict=strict)
        if decomposed:
            program = program.run_decompositions()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = [tensors[spec.target] for spec in program.graph_signature.input_specs if spec.target is not None]
    return program.graph_module, [*weights, *(value for value in inputs if value is not None)]


def decide(gm: fx.GraphModule, policy: SitePolicy = SITES, **options: Any) -> list[Site | Skip]:
    calls, unreadable = find_attention(gm)
    return decide_sites(calls, unreadable, analyse_token_layout(gm), policy, torch.device("cpu"), **options)


def rewritten(gm: fx.GraphModule, policy: SparsityPolicy = KEEP_ALL) -> tuple[fx.GraphModule, list[SparseSite]]:
    """A copy of ``gm`` with every site made sparse."""
    copied = copy_graph_module(gm)
    sites = canonical_sites(copied, [decision for decision in decide(copied) if isinstance(decision, Site)])
    records = sparsify(copied, sites, policy)
    erase_unused(copied, sites)
    return copied, records


def assert_unchanged(gm: fx.GraphModule, inputs: list[Any], expected: torch.Tensor) -> None:
    """The graph has one attention, and made sparse with all clusters kept it computes what was expected."""
    copied, sites = rewritten(gm)
    assert len(sites) == 1
    with torch.no_grad():
        (actual,) = copied(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def assert_spelling_is_exact(attend: Callable[..., torch.Tensor], dialect: str) -> None:
    """An attention of this spelling is read in a graph of this dialect, and made sparse it computes the same."""
    model = model_of(attend)
    if dialect == "dynamo":
        gm, inputs = dynamo_graph(model, video())
    else:
        gm, inputs = exported_graph(model, video(), decomposed=dialect == "decomposed")
    with torch.no_grad():
        assert_unchanged(gm, inputs, model(video()))


def reasons(gm: fx.GraphModule, policy: SitePolicy = SITES, **options: Any) -> list[str]:
    return [getattr(decision, "reason", "sparse") for decision in decide(gm, policy, **options)]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
