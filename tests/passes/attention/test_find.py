"""Every spelling of attention is found, and rewriting it with all clusters kept changes nothing."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from svg2_compile.passes.attention.find import find_attention
from tests.passes.attention_graphs import (
    DIALECTS,
    HEADS,
    SelfAttention,
    assert_spelling_is_exact,
    assert_unchanged,
    dynamo_graph,
    model_of,
    sdpa,
    video,
)


def keyword(query, key, value):
    return F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=None, scale=0.3)


def grouped_heads(query, key, value):
    return F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)


def repeated_heads(query, key, value):
    return sdpa(query, key[:, :1].repeat_interleave(2, dim=1), value[:, :1].expand(-1, HEADS, -1, -1))


SPELLINGS = [
    sdpa,
    keyword,
    grouped_heads,
    repeated_heads,
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("attend", SPELLINGS)
def test_spellings(attend, dialect):
    assert_spelling_is_exact(attend, dialect)


def _fused_graph(use_lse: bool, target=torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default):
    """A graph that calls a fused kernel, as PyTorch's dispatcher leaves it."""

    class Fused(SelfAttention):
        pass

    def attend(query, key, value):
        out, lse = target(query, key, value)
        return out + lse.unsqueeze(-1) if use_lse else out

    return dynamo_graph(Fused(attend).eval(), video())


def test_fused_kernels():
    gm, inputs = _fused_graph(use_lse=False)
    with torch.no_grad():
        assert_unchanged(gm, inputs, gm(*inputs)[0])


def test_a_used_log_sum_exp_is_unreadable():
    gm, _ = _fused_graph(use_lse=True)
    calls, (unreadable,) = find_attention(gm)
    assert calls == [] and unreadable.reason == "aux_outputs"


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    ],
)
def test_kernels_of_other_devices_are_read_by_their_schema(name):
    target = getattr(torch.ops.aten, name).default
    graph = fx.Graph()
    query, key, value = (graph.placeholder(role) for role in ("query", "key", "value"))
    needed = {a.name: None for a in target._schema.arguments if not a.has_default_value() and not a.kwarg_only}
    known = {"query": query, "key": key, "value": value, "compute_log_sumexp": True, "dropout_p": 0.0}
    known |= {"is_causal": False, "return_debug_mask": False, "max_q": 21, "max_k": 21, "custom_mask_type": 0}
    node = graph.call_function(target, tuple(known.get(argument) for argument in needed), {"scale": 0.5})
    output = graph.call_function(operator.getitem, (node, 0))
    graph.output((output,))
    (call,), unreadable = find_attention(fx.GraphModule(nn.Module(), graph))
    assert unreadable == [] and (call.node, call.query, call.key, call.value) == (output, query, key, value)
    assert call.scale == 0.5 and not call.is_causal and call.dropout_p == 0.0
    assert call.axes == ("bnhd" if name.endswith("_forward") else "bhnd")


@torch.library.custom_op("svg2_test::flash_attn_func", mutates_args=())
def _foreign(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


@_foreign.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


def test_another_librarys_attention_names_the_way_out():
    gm, _ = dynamo_graph(model_of(lambda q, k, v: torch.ops.svg2_test.flash_attn_func(q, k, v)), video())
    calls, (found,) = find_attention(gm)
    assert calls == [] and found.reason == "foreign_backend"
    assert 'set_attention_backend("native")' in found.detail


def test_names_are_module_paths_and_unique():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([model_of(lambda q, k, v: sdpa(q, k, sdpa(q, k, v))) for _ in range(2)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    gm, _ = dynamo_graph(Twice(), video())
    assert [call.name for call in find_attention(gm)[0]] == ["blocks.0", "blocks.0#2", "blocks.1", "blocks.1#2"]
