"""Operators and functions of attention libraries, by their names and schemas, computed on the CPU.

The packages need a GPU; a graph that calls them only needs their names. Schemas are those of flash-attn 2.8.3
(flash_attn/flash_attn_interface.py), flash-attn 3 (hopper, 3.0.0b1), diffusers 0.42 (attention_dispatch.py), xformers
0.0.32 (ops/fmha/flash.py) and sageattention 2.2.0 (sageattention/core.py).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_2 = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_FLASH_2_VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_FLASH_3 = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None, "
    "SymInt num_splits=1, bool? pack_gqa=None, SymInt sm_margin=0) -> (Tensor, Tensor)"
)
_DIFFUSERS_FLASH_3 = (
    "(Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False, Tensor? qv=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, SymInt attention_chunk=0, "
    "float softcap=0.0, SymInt num_splits=1, bool? pack_gqa=None, bool deterministic=False, SymInt sm_margin=0) "
    "-> (Tensor, Tensor)"
)
_XFORMERS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left, "
    "SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)
_SCHEMAS = {
    "flash_attn::_flash_attn_forward": _FLASH_2,
    "flash_attn::_flash_attn_varlen_forward": _FLASH_2_VARLEN,
    "flash_attn_3::_flash_attn_forward": _FLASH_3,
    "_diffusers_flash_attn_3::_flash_attn_forward": _DIFFUSERS_FLASH_3,
    "xformers_flash::flash_fwd": _XFORMERS,
}
_libraries: list[torch.library.Library] = []


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool = False) -> Tensor:
    """[B, N, H, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=causal)
    return out.transpose(1, 2).contiguous()


def attend_sequences(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """[tokens, H, D]; tokens of no sequence yield NaN, as memory that nobody wrote may."""
    out = torch.full_like(query, float("nan"))
    places = starts.tolist()
    for begin, end in itertools.pairwise(places):
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end])
        weights = (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, value[begin:end])
    return out


def _implementation(outputs: int, schema: torch._C.FunctionSchema) -> Any:
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (given[short] if short in given else given[long] for short, long in _ROLES)
        starts = given.get("cu_seqlens_q")
        if starts is None:
            causal = bool(given.get("causal", given.get("is_causal")))
            out = attend(query, key, value, given["softmax_scale"], causal)
        else:
            out = attend_sequences(query, key, value, starts, given["softmax_scale"])
        return (out, *(query.new_zeros(query.shape[:-1], dtype=torch.float32) for _ in range(outputs - 1)))

    return run


_ROLES = (("q", "query"), ("k", "key"), ("v", "value"))


def _fake(outputs: int) -> Any:
    def run(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        rest = (query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(outputs - 1))
        return (torch.empty_like(query), *rest)

    return run


def _define() -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("diffusers.models.attention_dispatch")  # defines its operator itself
    for name, schema in _SCHEMAS.items():
        namespace, _, short = name.partition("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        is_new = not hasattr(getattr(torch.ops, namespace), short)
        if is_new:
            library.define(short + schema)
        parsed = getattr(getattr(torch.ops, namespace), short).default._schema
        outputs = len(parsed.returns)
        library.impl(short, _implementation(outputs, parsed), "CPU")
        if is_new:
            torch.library.register_fake(name, _fake(outputs), lib=library)
        _libraries.append(library)


_define()


def _of_package(function: Any, module: str, name: str) -> Any:
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return torch.compiler.allow_in_graph(function)


def _sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    if tensor_layout == "NHD":
        return attend(q, k, v, sm_scale, is_causal)
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale, is_causal=is_causal)


def _xformers(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    if query.dim() == 3:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    return attend(query, key, value, scale)


def _flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **kwargs):
    return attend(q, k, v, softmax_scale, causal)


sageattn = _of_package(_sage, "sageattention.core", "sageattn")
memory_efficient_attention = _of_package(_xformers, "xformers.ops.fmha", "memory_efficient_attention")
flash_attn_func = _of_package(_flash, "flash_attn.flash_attn_interface", "flash_attn_func")


class FlashAttnFunc(torch.autograd.Function):
    """As the package wraps its operator."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rest = (0.0, scale, False, -1, -1, 0.0, None, False)
        out, lse, _, rng_state = torch.ops.flash_attn._flash_attn_forward(q, k, v, *rest)
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad, None
