"""Attention of other libraries: one table of how each spells it, and what their arguments mean.

    flash_attn::_flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, ...)   [B, N, H, D], several outputs
    flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, ...)                   [tokens of all sequences, H, D]
    sageattn(q, k, v, tensor_layout="HND", is_causal, sm_scale, ...)                   [B, H, N, D] or [B, N, H, D]
    xformers memory_efficient_attention(query, key, value, attn_bias, p, scale)        [B, N, H, D]

An operator brings its schema; of a Python function the table has the order of the arguments. What an argument may be is
one table for all of them, since they are named alike: an argument that is not in it, or has another value, is not
understood. None of these packages is needed to read a graph that calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value

__all__ = ["ForeignAttention", "Spelling", "read_foreign", "spelling_of"]


@dataclass(frozen=True)
class Spelling:
    """How a library spells attention. layout: of query, key, value and output ("nhd": sequences one after the other).
    functions: names, without namespace. libraries: how namespaces of operators, or packages of functions, begin.
    arguments: of a function, in their order. quantised: it computes with fewer bits than its inputs have, by design."""

    functions: frozenset[str]
    libraries: frozenset[str]
    layout: str
    arguments: tuple[str, ...] = ()
    quantised: bool = False


@dataclass(frozen=True)
class ForeignAttention:
    """One call, read. starts: the arguments with the starts of sequences, of queries and of keys. extra: what it has
    beyond softmax(scale * q @ k^T) @ v, in words; such a call stays as it is."""

    spelling: Spelling
    name: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    layout: str
    scale: float | None
    is_causal: bool
    dropout_p: float
    bias: fx.Node | None
    starts: tuple[fx.Node, fx.Node] | None
    extra: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FLASH = _words("flash_attn _flash_attn _diffusers_flash_attn vllm_flash_attn _vllm_fa")
_DENSE = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
_PACKED = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
_TABLE = (
    # flash-attn 2.8 (flash_attn/flash_attn_interface.py), flash-attn 3 (hopper/flash_attn_interface.py, 3.0.0b1)
    Spelling(_words("_flash_attn_forward fwd"), _FLASH, "bnhd or nhd"),
    Spelling(_words("_flash_attn_varlen_forward varlen_fwd"), _FLASH, "nhd"),
    Spelling(_words("flash_attn_func"), _FLASH, "bnhd", tuple(_DENSE.split())),
    Spelling(_words("flash_attn_varlen_func"), _FLASH, "nhd", tuple((_PACKED + _DENSE[6:]).split())),
    # sageattention 2.2 (sageattention/core.py)
    Spelling(
        _words(
            "sageattn sageattn_qk_int8_pv_fp16_cuda sageattn_qk_int8_pv_fp16_triton sageattn_qk_int8_pv_fp8_cuda "
            "sageattn_qk_int8_pv_fp8_cuda_sm90"
        ),
        _words("sage _sage"),
        "tensor_layout",
        ("q", "k", "v", "tensor_layout", "is_causal"),
        quantised=True,
    ),
    # xformers 0.0.32 (xformers/ops/fmha/__init__.py, xformers/ops/fmha/flash.py)
    Spelling(
        _words("memory_efficient_attention"),
        _words("xformers _xformers"),
        "bnhd",
        ("query", "key", "value", "attn_bias", "p", "scale", "op"),
    ),
    Spelling(_words("flash_fwd"), _words("xformers_flash"), "bnhd or nhd"),
    # torch 2.13 (torch/nn/attention/varlen.py)
    Spelling(_words("_varlen_attn"), _words("torch_attn"), "nhd"),
)

# What is only a way to compute the same, whatever its value; and what must have one of these values, or be missing.
_HARMLESS = _words(
    "deterministic return_softmax return_attn_probs return_lse return_softmax_lse num_splits pack_gqa sm_margin op "
    "max_seqlen_q max_seqlen_k max_q max_k enable_gqa zero_tensors smooth_k smooth_v pv_accum_dtype qk_quant_gran "
    "qk_quant_dtype attn_mask_type scheduler_metadata out_"
)
_NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("window_size_left", "window_size_right", "window_left", "window_right"), (-1, None)),
    "window_size": ((-1, -1), [-1, -1], None),
    "softcap": (0, None),
    "attention_chunk": (0, None),
    **dict.fromkeys(
        [
            "alibi_slopes",
            "block_table",
            "block_tables",
            "leftpad_k",
            "seqused_k",
            "seqused_q",
            "qv",
            "out",
            "k_new",
            "v_new",
            "cu_seqlens_k_new",
            "page_table",
            "kv_batch_idx",
            "rotary_cos",
            "rotary_sin",
            "seqlens_rotary",
            "q_descale",
            "k_descale",
            "v_descale",
            "s_aux",
            "sinks",
            "learnable_sink",
            "attn_mask",
        ],
        (None,),
    ),
}
_QUERY, _KEY, _VALUE = ("query", "q"), ("key", "k"), ("value", "v")
_SCALE = ("softmax_scale", "sm_scale", "scale")
_STARTS = (("cu_seqlens_q", "cu_seq_q"), ("cu_seqlens_k", "cu_seq_k"))
_CAUSAL, _DROPOUT, _BIAS = ("causal", "is_causal"), ("dropout_p", "p_dropout", "p"), ("attn_bias",)
_ROLES = {name for names in (_QUERY, _KEY, _VALUE, _SCALE, *_STARTS, _CAUSAL, _DROPOUT, _BIAS) for name in names}


def spelling_of(node: fx.Node) -> Spelling | None:
    """The row of the table that a node is a call of; None for everything else."""
    if node.op != "call_function":
        return None
    name, library = _name_and_library(node)
    for spelling in _TABLE:
        if name in spelling.functions and library.startswith(tuple(spelling.libraries)):
            return spelling
    return None


def read_foreign(node: fx.Node, numbers: Mapping[Any, Any] | None = None) -> ForeignAttention | None:
    """The call, read; None where it is none of the table, or its tensors are no nodes. numbers: of known symbols."""
    spelling = spelling_of(node)
    if spelling is None:
        return None
    arguments = _arguments(node, spelling)
    query, key, value = (_first(arguments, names) for names in (_QUERY, _KEY, _VALUE))
    if not (isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)):
        return None
    scale, bias = _first(arguments, _SCALE), _first(arguments, _BIAS)
    starts = [_first(arguments, names) for names in _STARTS]
    causal, dropout = _first(arguments, _CAUSAL) or False, _first(arguments, _DROPOUT) or 0.0
    scale = _number_of(scale, numbers or {})
    packed = any(start is not None for start in starts)
    extra = _extra(arguments)
    if isinstance(scale, fx.Node) or isinstance(causal, fx.Node) or isinstance(dropout, fx.Node):
        extra = "a scale, a causal flag or a dropout that is computed"
        scale, causal, dropout = None, False, 0.0
    if not (bias is None or isinstance(bias, fx.Node)):
        extra = f"attn_bias={type(bias).__name__}"
    nodes = [start for start in starts if isinstance(start, fx.Node)]
    if packed and len(nodes) != 2:
        extra = "starts of sequences for queries or for keys alone"
    return ForeignAttention(
        spelling=spelling,
        name=_name_and_library(node)[0],
        query=query,
        key=key,
        value=value,
        layout=_layout(spelling, arguments, packed),
        scale=None if scale is None else float(scale),
        is_causal=bool(causal),
        dropout_p=float(dropout),
        bias=bias if isinstance(bias, fx.Node) else None,
        starts=(nodes[0], nodes[1]) if len(nodes) == 2 else None,
        extra=extra,
        arguments=arguments,
    )


def _number_of(scale: Any, numbers: Mapping[Any, Any]) -> Any:
    """A scale that was computed from sizes, where these are known."""
    value = node_value(scale) if isinstance(scale, fx.Node) else None
    if isinstance(value, torch.SymFloat):
        result = value.node.expr.xreplace(dict(numbers))
        return float(result) if result.is_number else scale
    return value if isinstance(value, float) else scale


def _name_and_library(node: fx.Node) -> tuple[str, str]:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name, namespace
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return name, namespace
    return operator_name(node), str(getattr(target, "__module__", "") or "").partition(".")[0]


def _arguments(node: fx.Node, spelling: Spelling) -> dict[str, Any]:
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    names = spelling.arguments
    if isinstance(target, torch._ops.OpOverload):
        names = tuple(argument.name for argument in target._schema.arguments)
    bound = dict(zip(names, node.args, strict=False))
    if len(node.args) > len(names):
        bound["<more>"] = len(node.args)
    return {**bound, **node.kwargs}


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def _extra(arguments: Mapping[str, Any]) -> str | None:
    for name, value in arguments.items():
        if name in _ROLES or name in _HARMLESS or name == "tensor_layout":
            continue
        plain = tuple(value) if isinstance(value, (list, tuple)) else value
        if name in _NOTHING and not isinstance(value, fx.Node) and plain in _NOTHING[name]:
            continue
        return f"{name}={value}"
    return None


def _layout(spelling: Spelling, arguments: Mapping[str, Any], packed: bool) -> str:
    if spelling.layout == "tensor_layout":
        return "bnhd" if arguments.get("tensor_layout", "HND") == "NHD" else "bhnd"
    if spelling.layout == "bnhd or nhd":
        return "nhd" if packed else "bnhd"
    return spelling.layout
