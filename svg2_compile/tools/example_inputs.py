"""Inputs for a video transformer that nobody has described: from the names in its signature and its configuration.

Diffusers' transformers share a vocabulary (``hidden_states``, ``timestep`` ...; ``in_channels``,
``text_embed_dim`` ...) but not a layout: latents may come with channels or frames first, or packed into tokens. So the
plausible layouts are tried in turn, and the model itself says which one it takes. Nothing here knows a model by name.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["InputsNotFound", "VideoShape", "find_inputs"]

_CHANNEL_KEYS = ("in_channels", "in_visual_dim", "latent_channels")
_TEXT_KEYS = (
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "in_text_dim",
    "joint_attention_dim",
    "encoder_hidden_states_channels",
    "crossattn_proj_in_channels",
    "cross_attention_dim",
)
_POOLED_KEYS = ("pooled_projection_dim", "in_text_dim2")
_TEXT_LENGTH_KEYS = ("max_text_seq_length", "max_sequence_length")
_MOST_TRIALS = 64


class InputsNotFound(ValueError):
    """No inputs were found that the model takes; names the parameters and what to give."""


@dataclass(frozen=True)
class VideoShape:
    """The size of a video in latents, before the model cuts it into patches. None: from the model's configuration
    where it tells (``sample_frames`` ...), otherwise 81 frames at 720p as most video models encode them: 21 x 90 x 160.
    """

    batch: int = 1
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    text_tokens: int | None = None

    def resolve(self, config: Mapping[str, Any]) -> VideoShape:
        """All sizes as numbers."""
        frames = self.frames
        if frames is None:
            frames = _first(config, ("sample_frames", "video_length")) or 21
            # Where the configuration knows the compression, its frames are those of the video, not of the latents.
            frames = (frames - 1) // config.get("temporal_compression_ratio", 1) + 1
        square = config.get("sample_size") if isinstance(config.get("sample_size"), int) else None
        return VideoShape(
            self.batch,
            frames,
            self.height or config.get("sample_height") or square or 90,
            self.width or config.get("sample_width") or square or 160,
            self.text_tokens or _first(config, _TEXT_LENGTH_KEYS) or 512,
        )


def find_inputs(
    module: nn.Module, config: Mapping[str, Any], video: VideoShape, given: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments that ``module`` accepts, found by trying.

    Args:
        module: a model; under FakeTensorMode a trial costs neither memory nor arithmetic.
        config: what the model was built with, defaults included.
        video: how large the video is.
        given: arguments that are known; they are used as they are.
        dtype: of the floating-point inputs.

    Raises:
        InputsNotFound: no combination ran; tells the first error and the parameters that are still open.
    """
    video = video.resolve(config)
    parameters = inspect.signature(module.forward).parameters
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        raise InputsNotFound(
            f"--input: {type(module).__name__} has no input {unknown[0]!r}. Valid: {_names(parameters)}."
        )
    open_names = [
        name
        for name, parameter in parameters.items()
        if name not in given and name not in _RULES and parameter.default is inspect.Parameter.empty
    ]
    open_names = [name for name in open_names if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if open_names:
        raise InputsNotFound(
            f"{type(module).__name__} needs {', '.join(open_names)}, for which there is no rule. "
            f"Give {'it' if len(open_names) == 1 else 'them'} with --input NAME=SHAPE:DTYPE."
        )
    return _try(module, _candidates(parameters, config, video, given, dtype))


def _try(module: nn.Module, candidates: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The first candidate with which ``module`` runs, or else the first that fails only for the want of values."""
    needs_values: dict[str, Any] | None = None
    first_error: Exception | None = None
    for inputs in itertools.islice(candidates, _MOST_TRIALS):
        try:
            with torch.no_grad():
                module(**inputs)
        except Exception as error:  # noqa: BLE001 - a model may refuse inputs with any exception
            if _depends_on_values(error):
                needs_values = needs_values or inputs
            first_error = first_error or error
        else:
            return inputs
    if needs_values is not None:
        return needs_values
    raise InputsNotFound(
        f"no inputs found that {type(module).__name__} takes. The first try ended with {type(first_error).__name__}: "
        f"{first_error}. Give inputs with --input NAME=SHAPE:DTYPE; the inputs are "
        f"{_names(inspect.signature(module.forward).parameters)}."
    )


def _depends_on_values(error: BaseException | None) -> bool:
    """Whether a model asked for the value of a tensor that has none (a mask's length, say)."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)


def _candidates(
    parameters: Mapping[str, inspect.Parameter],
    config: Mapping[str, Any],
    video: VideoShape,
    given: Mapping[str, Any],
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """All combinations of what the rules offer, the most likely first."""
    names = [name for name in parameters if name not in given and name in _RULES]
    offers = []
    for name in names:
        values = _RULES[name](_Context(config, video, dtype))
        if parameters[name].default is not inspect.Parameter.empty and name in _OPTIONAL:
            values = [_LEAVE_OUT, *values] if name in _RARELY_NEEDED else [*values, _LEAVE_OUT]
        offers.append(values)
    for chosen in itertools.product(*offers):
        found = {name: value for name, value in zip(names, chosen, strict=True) if value is not _LEAVE_OUT}
        yield {**found, **given}


_LEAVE_OUT = object()


@dataclass(frozen=True)
class _Context:
    config: Mapping[str, Any]
    video: VideoShape
    dtype: torch.dtype


def _latents(context: _Context) -> list[Any]:
    video, channels = context.video, _first(context.config, _CHANNEL_KEYS) or 16
    batch, frames, height, width = video.batch, video.frames, video.height, video.width
    assert frames is not None
    assert height is not None
    assert width is not None
    shapes = [
        (batch, channels, frames, height, width),
        (batch, frames, channels, height, width),
        (batch, frames, height, width, channels),
        (batch, frames * height * width, channels),
    ]
    return [torch.zeros(shape, dtype=context.dtype) for shape in shapes]


def _text(context: _Context) -> list[Any]:
    widths = dict.fromkeys(context.config[key] for key in _TEXT_KEYS if isinstance(context.config.get(key), int))
    batch, tokens = context.video.batch, context.video.text_tokens
    assert tokens is not None
    flat = [torch.zeros(batch, tokens, width, dtype=context.dtype) for width in widths]
    return [*flat, *(text.unsqueeze(1) for text in flat)]


def _text_mask(context: _Context) -> list[Any]:
    assert context.video.text_tokens is not None
    shape = (context.video.batch, context.video.text_tokens)
    return [torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)]


def _pooled(context: _Context) -> list[Any]:
    width = _first(context.config, _POOLED_KEYS)
    return [] if width is None else [torch.zeros(context.video.batch, width, dtype=context.dtype)]


def _timestep(context: _Context) -> list[Any]:
    return [torch.full((context.video.batch,), 500)]


def _guidance(context: _Context) -> list[Any]:
    return [torch.full((context.video.batch,), 6000.0, dtype=context.dtype)]


_RULES: Mapping[str, Callable[[_Context], list[Any]]] = {
    "hidden_states": _latents,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": _text_mask,
    "encoder_hidden_states_mask": _text_mask,
    "pooled_projections": _pooled,
    "timestep": _timestep,
    "guidance": _guidance,
    "num_frames": lambda context: [context.video.frames],
    "height": lambda context: [context.video.height],
    "width": lambda context: [context.video.width],
    "return_dict": lambda context: [False],
}
_OPTIONAL = ("encoder_attention_mask", "encoder_hidden_states_mask", "guidance", "pooled_projections")
_RARELY_NEEDED = ("encoder_attention_mask", "encoder_hidden_states_mask", "guidance")


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _names(parameters: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(name for name in parameters if name != "return_dict")
