"""Analysis: find every attention of a graph, however it is spelled.

Needs: fake metadata on the nodes. Changes nothing.

Read are, in Dynamo's torch-level graphs and in ATen graphs alike:

    scaled_dot_product_attention(query, key, value, ...)     positional or keyword arguments, [B, H, N, D]
    aten._scaled_dot_product_{flash,efficient,cudnn,...}     PyTorch's fused kernels, several outputs
    aten._{flash,efficient}_attention_forward                the same one level lower, [B, N, H, D]
    flash-attn, sageattention, xformers, PyTorch's varlen     see foreign.py
    flex_attention without a mask, or with key padding       see flex.py
    softmax(query @ key^T * scale + mask) @ value            see decomposed.py

Every attention ends as an AttentionCall or as an UnreadableAttention that names the way out.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.attention.decomposed import read_decomposed
from svg2_compile.passes.attention.flex import read_flex_attention
from svg2_compile.passes.attention.foreign import read_foreign_attention
from svg2_compile.passes.graph.collectives import rank_groups
from svg2_compile.passes.graph.nodes import bind_arguments, module_path, operator_name
from svg2_compile.passes.graph.values import is_nested, node_value

__all__ = ["find_attention"]


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_NATIVE = (
    "call torch.nn.functional.scaled_dot_product_attention in its place (most model code does where the library is "
    'missing; diffusers: model.set_attention_backend("native"))'
)
_NESTED = (
    "over nested tensors, whose sequences have lengths that only the run knows: hand attention a padded tensor with a "
    "mask over keys, or the video alone"
)
_FOREIGN = ("flash_attn", "sageattn", "sage_attn", "xformers", "memory_efficient_attention", "natten")


def find_attention(
    gm: fx.GraphModule, numbers: Mapping[sympy.Symbol, Any] | None = None
) -> tuple[list[AttentionCall], list[UnreadableAttention]]:
    """List the attentions of ``gm`` in the order of the graph, with unique names. ``numbers``: of symbols, if known."""
    calls: list[AttentionCall] = []
    unreadable: list[UnreadableAttention] = []
    for node in gm.graph.nodes:
        found = read_foreign_attention(node, numbers or {}) or read_flex_attention(gm, node)
        found = found or _read_fused(node) or read_decomposed(node)
        if isinstance(found, AttentionCall):
            calls.append(found)
        elif isinstance(found, UnreadableAttention):
            unreadable.append(found)
    if any(found.reason == "aux_outputs" for found in unreadable) and rank_groups(gm):
        unreadable = [_of_a_ring(found) for found in unreadable]
    return _with_unique_names(calls), unreadable


def _of_a_ring(found: UnreadableAttention) -> UnreadableAttention:
    """Among ranks, a log-sum-exp is used to join what each of them has attended to."""
    if found.reason != "aux_outputs":
        return found
    detail = (
        "a part of the keys at a time, joined by the log-sum-exp (ring attention): clusters need all keys. "
        "ContextParallelConfig(ulysses_degree=...) brings them together"
    )
    return replace(found, reason="local_keys", detail=detail)


def _read_fused(node: fx.Node) -> AttentionCall | UnreadableAttention | None:
    if node.op != "call_function":
        return None
    name = operator_name(node)
    if name == "scaled_dot_product_attention" and any(map(is_nested, node.all_input_nodes)):
        return UnreadableAttention(node, module_path(node), "nested_tensor", _NESTED)
    if name == "scaled_dot_product_attention":
        return _call(node, node, bind_arguments(node, _SDPA_ARGUMENTS), "sdpa")
    if name.startswith("_scaled_dot_product_") and _is_aten(node):
        return _with_several_outputs(node, "bhnd")
    if name in ("_flash_attention_forward", "_efficient_attention_forward") and _is_aten(node):
        return _read_packed(node)
    if name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        return UnreadableAttention(
            node,
            module_path(node),
            "unreadable",
            "attention and projections are one fused operator: torch.backends.mha.set_fastpath_enabled(False)",
        )
    if _is_foreign(node, name):
        return UnreadableAttention(
            node, module_path(node), "foreign_backend", f"{name} is another attention implementation: {_NATIVE}"
        )
    return None


def _call(node: fx.Node, output: fx.Node, arguments: dict[str, Any], form: str) -> AttentionCall:
    mask = arguments.get("attn_mask", arguments.get("attn_bias", arguments.get("bias")))
    scale = arguments.get("scale")
    return AttentionCall(
        node=output,
        query=arguments["query"],
        key=arguments["key"],
        value=arguments["value"],
        attn_mask=mask,
        scale=None if scale is None else float(scale),
        is_causal=bool(arguments.get("is_causal", False)),
        dropout_p=float(arguments.get("dropout_p", 0.0)),
        form=form,
        name=module_path(node),
    )


def _with_several_outputs(node: fx.Node, axes: str) -> AttentionCall | UnreadableAttention | None:
    """A fused kernel that also returns a log-sum-exp and random state: only its first output may be used."""
    outputs = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(outputs) != len(node.users) or any(index != 0 and user.users for index, user in outputs.items()):
        return UnreadableAttention(
            node,
            module_path(node),
            "aux_outputs",
            "the log-sum-exp of the attention is used: rewrite is only possible where the output alone is",
        )
    if 0 not in outputs:
        return None
    call = _call(node, outputs[0], bind_arguments(node, ()), operator_name(node).strip("_"))
    return replace(call, axes=axes, source=node)


def _read_packed(node: fx.Node) -> AttentionCall | UnreadableAttention | None:
    arguments = bind_arguments(node, ())
    ragged = ("cum_seq_q", "cum_seq_k", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "window_size_left", "window_size")
    if any(arguments.get(name) is not None for name in ragged) or arguments.get("custom_mask_type", 0) != 0:
        return UnreadableAttention(
            node,
            module_path(node),
            "unreadable",
            f"sequences of several lengths packed into one, or windows: {_NATIVE}",
        )
    return _with_several_outputs(node, "bnhd")


def _is_aten(node: fx.Node) -> bool:
    """Whether a node calls an operator of ATen, one overload of it (ATen graphs) or all (torch-level graphs)."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.startswith("aten::")
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _is_foreign(node: fx.Node, name: str) -> bool:
    """Another library's attention: named so, or any call named attention on three or more tensors of rank >= 3."""
    lowered = name.lower()
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "svg2", "prims"):
        return False
    if any(part in lowered for part in _FOREIGN):
        return True
    if "attention" not in lowered and "attn" not in lowered:
        return False
    ranks = [value.dim() for n in node.all_input_nodes if isinstance(value := node_value(n), torch.Tensor)]
    return sum(rank >= 3 for rank in ranks) >= 3


def _with_unique_names(calls: list[AttentionCall]) -> list[AttentionCall]:
    """Number the attentions that one module computes several times: "attn", "attn#2"."""
    seen: Counter[str] = Counter()
    result = []
    for call in calls:
        seen[call.name] += 1
        count = seen[call.name]
        result.append(call if count == 1 else replace(call, name=f"{call.name}#{count}"))
    return result
