"""The callable that vLLM-Omni's dispatcher loads: its parameters read, and its layout, [B, N, H, D], turned.

``params`` is one flat dict: what the user configured (options of svg2_compile, and ``video``), what the host knows of
the denoising loop and of the video, and a mask. Layers are told apart by the object of the host that calls.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from svg2_compile.eager import AttentionState, CallOptions, attend, eager_config, segments
from svg2_compile.logs.logger import Once, get_logger
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.session import report_of
from svg2_compile.runtime.standing import denoising
from svg2_compile.settings.options import ALIASES, SPECS

__all__ = ["attention", "report", "reset"]

_HOST = {
    "denoise_step_idx",
    "total_denoise_steps",
    "latent_shape",
    "patch_size",
    "total_latent_frames",
    "patches_per_frame",
    "attn_mask",
}
_PLACES = ("all", "first", "last")
_once = Once(get_logger())
_states: dict[Any, AttentionState] = {}
_layers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


@torch.compiler.disable(reason="the svg2 plug-in plans every call")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """Sparse self-attention as vLLM-Omni's dispatcher calls it.

    Args:
        query, key, value: [B, N, H, D]; keys and values may have fewer heads.
        params: the options of svg2_compile; ``video``: "all", "first" or "last" (the video's tokens begin or end the
            sequence) or [start, length], found from the geometry where it is left out; and what the host adds:
            ``denoise_step_idx``, ``total_denoise_steps``, ``latent_shape``, ``patch_size``, ``total_latent_frames``,
            ``patches_per_frame``, ``attn_mask``.
        is_causal, softmax_scale: as of the host.

    Returns:
        [B, N, H, D].

    Raises:
        ValueError: an option or ``video`` is not valid.
    """
    caller = _caller()
    state = _state_of(params)
    step = _number(params, "denoise_step_idx")
    total = _number(params, "total_denoise_steps")
    inputs = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    mask = params.get("attn_mask")
    if mask is not None:
        inputs.append(mask[:, None, None, :] if mask.dim() == 2 else mask)
    if step is not None and total is not None and step >= total:
        total = None
    parts = _parts(params, query.shape[1])
    options = CallOptions(is_causal, softmax_scale, caller is not None)
    with denoising(step=step, num_steps=total):
        return attend(state, inputs, options, parts, _layer_of(caller)).transpose(1, 2)


attention.capabilities = {"supports_attention_mask": True, "supports_full_attn_spans": False}


def report() -> Report:
    """What was decided and what ran in this process."""
    return report_of([state.session for state in _states.values()])


def reset() -> None:
    """Drop all centroids of this process."""
    for state in _states.values():
        state.reset()


def _state_of(params: Mapping[str, Any]) -> AttentionState:
    """One state for every set of options."""
    options = {name: value for name, value in params.items() if name in SPECS or name in ALIASES}
    for name in params.keys() - options.keys() - _HOST - {"video"}:
        _once.warning(
            name, "vllm_omni plug-in svg2: params[%r] is not known and has no effect. Valid: video, %s", name, _VALID
        )
    key = tuple(sorted((name, repr(value)) for name, value in options.items()))
    if key not in _states:
        eager_config(options)
        _states[key] = AttentionState(**options)
    return _states[key]


_VALID = ", ".join(SPECS)


def _caller() -> Any:
    """The object of the host whose method calls the plug-in; None if it is no method."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame.f_locals.get("self")


def _layer_of(caller: Any) -> str | None:
    """The host has one object for each layer, and it is what calls."""
    if caller is None:
        return None
    try:
        if caller not in _layers:
            _layers[caller] = next(_numbers)
    except TypeError:  # nothing that can be remembered: calls go by their order
        return None
    return f"layers.{_layers[caller]}"


def _number(params: Mapping[str, Any], name: str) -> int | None:
    """A number that the host knows: of its context, which is on the host, else of the tensor that it hands over."""
    if params.get(name) is None:
        return None
    found = getattr(_context(), name, None)
    if found is None:
        found = params[name]
        if isinstance(found, torch.Tensor):
            samples = set(found.reshape(-1).tolist())
            if len(samples) != 1:
                _once.warning(name, "vllm_omni plug-in svg2: samples of one batch have different %s: %s", name, samples)
                return None
            (found,) = samples
    return int(found)


@functools.cache
def _forward_context() -> Any:
    try:
        from vllm_omni.diffusion import forward_context
    except ImportError:
        return None
    return forward_context


def _context() -> Any:
    module = _forward_context()
    if module is None or not module.is_forward_context_available():
        return None
    return module.get_forward_context()


def _parts(params: Mapping[str, Any], num_tokens: int) -> Any:
    """Where the video is among ``num_tokens``; StaysDense where nobody tells."""
    said = params.get("video")
    if said is not None and not isinstance(said, str):
        return segments(tuple(said), num_tokens)
    if said not in (None, *_PLACES):
        raise ValueError(f"params['video'] is {said!r}. Valid: 'all', 'first', 'last', or [start, length].")
    count = num_tokens if said == "all" else _video_tokens(params)
    if count == num_tokens:
        return ((0, num_tokens),)
    if count is None or count > num_tokens:
        return StaysDense("unknown_layout", "the host tells no geometry of the video: params['video']='all' if all is")
    if said is None:
        detail = f"{count} of {num_tokens} tokens are video: params['video']='first' or 'last' tells which"
        return StaysDense("unknown_layout", detail)
    return ((0 if said == "first" else num_tokens - count, count),)


def _video_tokens(params: Mapping[str, Any]) -> int | None:
    frames, patches = params.get("total_latent_frames"), params.get("patches_per_frame")
    if frames is not None and patches is not None:
        return _first(frames)[0] * _first(patches)[0]
    latent, patch = params.get("latent_shape"), params.get("patch_size")
    if latent is None or patch is None:
        return None
    count = 1
    for extent, size in zip(_first(latent), _first(patch), strict=True):
        count *= extent // size
    return count


def _first(value: Any) -> list[int]:
    """Of a number, a list, or a tensor with a row for every sample: the numbers of the first sample."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    while isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        value = value[0]
    return [int(number) for number in value] if isinstance(value, (list, tuple)) else [int(value)]
