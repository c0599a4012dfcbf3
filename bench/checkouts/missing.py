"""What model code imports and does not need for one call on a CPU is left empty; flash-attn is computed plainly."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import math
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def package(name: str, path: Path) -> None:
    """A package without its __init__, which imports all of a repository."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """What the repositories call where flash-attn is missing: [B, N, H, D]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    return module.float().eval()


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that a model does not need for one call on a CPU: whatever is imported from them is a mock."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self.roots = roots

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        wanted = any(name == root or name.startswith(root + ".") for root in self.roots)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(__path__=[], __getattr__=lambda name: _mocked(name))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _mocked(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name)


def missing(*roots: str) -> None:
    sys.meta_path.insert(0, _Missing(roots))


def module(name: str, **attributes: Any) -> Any:
    sys.modules[name] = made = types.ModuleType(name)
    vars(made).update(attributes)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []
    return made


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def flash_attn_package() -> Any:
    """flash-attn for a CPU, as its functions and operators are named."""
    rest = "float dropout_p, float softmax_scale, bool causal) -> (Tensor, Tensor)"
    library = torch.library.Library("flash_attn", "DEF")
    library.define(
        "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        f"SymInt max_seqlen_q, SymInt max_seqlen_k, {rest}"
    )
    library.define(f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {rest}")

    def varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *rest: Any) -> Any:
        _, _, _, scale, _ = rest
        out, (queries, keys) = torch.full_like(q, math.nan), (starts.tolist() for starts in (starts_q, starts_k))
        for begin, end, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
            out[begin:end] = _softmax_attention(q[begin:end], k[first:last], v[first:last], scale)
        return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)

    def dense(q: Tensor, k: Tensor, v: Tensor, _dropout: float, scale: float, _causal: bool) -> Any:
        out = torch.stack([_softmax_attention(*row, scale) for row in zip(q, k, v, strict=True)])
        return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)

    for name, run in (("_flash_attn_varlen_forward", varlen), ("_flash_attn_forward", dense)):
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"flash_attn::{name}", lambda q, *_: (torch.empty_like(q), q[..., 0].float()))
    package = module("flash_attn", __version__="2.8.3", library=library)
    operators = torch.ops.flash_attn

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operators._flash_attn_forward(q, k, v, 0.0, q.shape[-1] ** -0.5, False)[0]

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> Any:
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return operators._flash_attn_varlen_forward(*packed, 0.0, softmax_scale or q.shape[-1] ** -0.5, False)[0]

    def flash_attn_varlen_qkvpacked_func(
        qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, **rest: Any
    ) -> Any:
        query, key, value = qkv.unbind(1)
        starts = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return flash_attn_varlen_func(query, key, value, *starts, dropout_p, rest.get("softmax_scale"))

    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func)
    vars(package).update({function.__name__: function for function in functions})
    module("flash_attn.flash_attn_interface", _flash_attn_forward=None, **{f.__name__: f for f in functions})
    module("flash_attn.bert_padding", unpad_input=_unpad, pad_input=_pad)
    return package


def _unpad(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Any, ...]:
    """flash_attn.bert_padding.unpad_input: [B, N, ...] -> the tokens that a mask [B, N] keeps, and where they were."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    places = torch.nonzero(attention_mask.flatten(), as_tuple=False).flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[places], places, starts, int(lengths.max()), lengths


def _pad(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """flash_attn.bert_padding.pad_input: the way back, with zeros."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices] = hidden_states
    return out.unflatten(0, (batch, seqlen))


class _Cpu:
    """torch, whose zeros are on a CPU whatever device is named."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


def on_cpu(module: Any) -> None:
    module.torch = _Cpu()
