"""attention: SVG2 as a plain function, for those who write their own loop or cannot compile their model.

    state = svg2_compile.AttentionState(density=0.1, dense_steps=10)
    for step, timestep in enumerate(timesteps):
        with svg2_compile.denoising(step=step, num_steps=len(timesteps)):
            model(...)  # in its layers: svg2_compile.attention(query, key, value, state=state, layer=7)

A call is a graph of one attention, rewritten by the passes that rewrite a model's, planned by a session and run with
the centroids of its store. It is run operator by operator; nothing is compiled unless ``inner_backend`` says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from svg2_compile.backend import Svg2Backend
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.reporting.report import Report
from svg2_compile.runtime.model_call import Part, running_part
from svg2_compile.runtime.program import DenoisingProgram
from svg2_compile.runtime.session import Session, report_of
from svg2_compile.runtime.standing import denoising
from svg2_compile.settings.config import Svg2Config

__all__ = ["AttentionState", "CallOptions", "attend", "attention", "eager_config", "segments"]

Segments = tuple[tuple[int, int], ...]


class CallOptions(NamedTuple):
    """What a call asks for beside its tensors. named: the layer is known."""

    is_causal: bool
    scale: float | None
    named: bool


def eager_config(options: Mapping[str, Any]) -> Svg2Config:
    """The settings of attentions that run operator by operator, unless ``inner_backend`` says otherwise."""
    return Svg2Config.from_options({"inner_backend": "eager", **options})


class _Place:
    """Stands for a layer of which only a name is known."""

    __slots__ = ("__weakref__",)


class AttentionState:
    """What the attentions of one model carry from step to step: options, centroids, and what ran.

    Args:
        num_layers: how many layers will call, so that ``dense_layers`` as a fraction is right from the first call on;
            None counts those that have called.
        scheduler: the scheduler that drives the model, to tell the step where no ``denoising`` does. A diffusers
            pipeline that makes the call is found without it.
        **options: the fields of Svg2Config; ``inner_backend`` is "eager" by default.

    Raises:
        TypeError: ``num_layers`` is no integer, or ``scheduler`` is no scheduler.
        ValueError: a number is out of range, or an option is unknown (ConfigError).
    """

    def __init__(self, *, num_layers: int | None = None, scheduler: Any = None, **options: Any) -> None:
        if num_layers is not None and (not isinstance(num_layers, int) or isinstance(num_layers, bool)):
            raise TypeError(f"num_layers is {num_layers!r}. Valid: an integer of at least 1, or None.")
        if num_layers is not None and num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}. Valid: an integer of at least 1, or None.")
        follow = None if scheduler is None else lambda: scheduler
        self._begin(Session(eager_config(options), follow, num_layers=num_layers))
        self.session.follow_scheduler()

    def _begin(self, session: Session) -> None:
        self.session = session
        self._programs: dict[Hashable, Any] = {}
        self._parts: dict[Hashable, Part] = {}

    @classmethod
    def of_session(cls, session: Session) -> AttentionState:
        """The state of attentions that belong to a session that is there, for hosts that know their model."""
        state = cls.__new__(cls)
        state._begin(session)
        return state

    @property
    def config(self) -> Svg2Config:
        return self.session.config

    def report(self) -> Report:
        """What was decided and what ran."""
        return report_of([self.session])

    def reset(self) -> None:
        """Drop all centroids; the next call begins a video."""
        self.session.reset()

    def __repr__(self) -> str:
        store = self.session.store
        return f"AttentionState({len(self._parts)} layers, {store.num_bytes / 2**20:.1f} MiB of centroids)"

    def _part(self, layer: Hashable) -> Part:
        if layer not in self._parts:
            label = f"layers.{layer}" if isinstance(layer, int) else "" if layer is None else str(layer)
            self._parts[layer] = Part(self.session, _Place(), label)
        return self._parts[layer]

    def _program(self, inputs: Sequence[torch.Tensor], options: CallOptions, parts: Segments | StaysDense) -> Any:
        """The program of calls like this one."""
        told = parts if isinstance(parts, tuple) else (parts.reason, parts.detail)
        key = (options, told, _autocast(inputs[0].device), *(_like(tensor) for tensor in inputs))
        if key not in self._programs:
            graph = _graph(inputs, options)
            backend = Svg2Backend(self.config, self.session, regional=options.named, video_parts=parts)
            examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
            self._programs[key] = backend(graph, examples)
        return self._programs[key]


@torch.compiler.disable(reason="svg2_compile.attention plans every call; compile the model with backend='svg2' instead")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    state: AttentionState,
    video: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    layer: Hashable = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    step: int | None = None,
    num_steps: int | None = None,
    branch: Hashable = None,
) -> torch.Tensor:
    """Attention as of ``scaled_dot_product_attention``, sparse where that pays (SVG2, arXiv 2505.18875, section 4).

    What cannot be sparse is computed densely, with the reason in ``state.report()``: fewer tokens than pay, queries and
    keys that are different tokens, a mask that is no key padding, a causal mask, inputs that want gradients, dense
    steps and layers, and calls whose step nobody tells.

    One call is one layer: with ``budget="layer"`` (the default with first-order compensation) all batches and heads of
    the call share the density.

    Args:
        query: [B, H, N, D], float32, bfloat16 or float16.
        key, value: [B, G, N, D] with H a multiple of G (grouped queries).
        state: of the model that calls; one for all its layers.
        video: start and length of the video tokens on the token axis, or several such pieces in their order; the rest
            (text, reference images) is attended by every query and attends to every key. None: all tokens are video.
        layer: tells the layers of the model apart, an index or a path. None: the calls of one step are told apart by
            their order, and ``dense_layers`` does not apply.
        attn_mask: as of scaled_dot_product_attention, broadcastable to [B, H, N, N].
        is_causal: as there.
        scale: of the scores; None is 1 / sqrt(D).
        step, num_steps, branch: where the call stands, as ``svg2_compile.denoising`` says it.

    Returns:
        [B, H, N, D] in the dtype of dense attention.

    Raises:
        TypeError: an argument is of another type.
        ValueError: shapes, dtypes or devices do not fit, or ``video`` is not within the tokens.
    """
    _check(query, key, value, attn_mask, state)
    parts = segments(video, query.shape[2])
    options = CallOptions(is_causal, scale, layer is not None)
    inputs = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    said = (step, num_steps, branch) != (None, None, None)
    place = denoising(step=step, num_steps=num_steps, branch=branch) if said else contextlib.nullcontext()
    with place:
        return attend(state, inputs, options, parts, layer)


def attend(
    state: AttentionState,
    inputs: Sequence[torch.Tensor],
    options: CallOptions,
    parts: Segments | StaysDense,
    layer: Hashable,
) -> torch.Tensor:
    """``attention`` for a caller that has checked the arguments, and knows where the video is or why nobody does."""
    program = state._program(inputs, options, parts)
    with running_part(state._part(layer)):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _with_gradients(program, state, inputs)
        (out,) = program(*inputs)
    return out


def _with_gradients(program: Any, state: AttentionState, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    state.session.once.warning(
        "training",
        "gradients are wanted: attention stays dense. SVG2 is for inference; call the model under torch.no_grad() or "
        "torch.inference_mode().",
    )
    if isinstance(program, DenoisingProgram):
        (out,) = program.run_dense(inputs, "training")
    else:
        (out,) = program(*inputs)
    return out


def _graph(inputs: Sequence[torch.Tensor], asked: CallOptions) -> fx.GraphModule:
    """The attention as a graph of Dynamo's kind: what the passes read."""
    graph = fx.Graph()
    fakes: list[torch.Tensor] = []
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        for name, tensor in zip(("query", "key", "value", "attn_mask"), inputs, strict=False):
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            fakes.append(fake)
            node = graph.placeholder(name)
            node._dynamo_source = ConstantSource(name)
            node.meta["example_value"] = fake
        grouped = inputs[0].shape[1] != inputs[1].shape[1]
        options: dict[str, Any] = {"is_causal": asked.is_causal, "scale": asked.scale, "enable_gqa": grouped}
        target: Any = torch._C._nn.scaled_dot_product_attention
        placeholders = tuple(graph.find_nodes(op="placeholder"))
        attended = graph.create_node("call_function", target, placeholders, options, name="attention")
        attended.meta["example_value"] = target(*fakes, **options)
    graph.output((attended,))
    return fx.GraphModule(torch.nn.Module(), graph)


def _like(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype that scaled_dot_product_attention casts to now, if it does."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def segments(video: Any, num_tokens: int) -> Segments:
    """The ``video`` of ``attention`` as pieces, checked."""
    if video is None:
        return ((0, num_tokens),)
    pieces = [video] if isinstance(video, Sequence) and len(video) == 2 and isinstance(video[0], int) else video
    valid = f"Valid: (start, length), or several of them in their order, within the {num_tokens} tokens; or None."
    if not isinstance(pieces, Sequence) or isinstance(pieces, str) or not pieces:
        raise TypeError(f"video is {video!r}. {valid}")
    end, found = 0, []
    for piece in pieces:
        if not isinstance(piece, Sequence) or len(piece) != 2 or not all(type(number) is int for number in piece):
            raise TypeError(f"video is {video!r}. {valid}")
        start, length = piece
        if start < end or length < 1 or start + length > num_tokens:
            raise ValueError(f"video is {video!r}. {valid}")
        end = start + length
        found.append((start, length))
    return tuple(found)


def _check(query: Any, key: Any, value: Any, attn_mask: Any, state: Any) -> None:
    if not isinstance(state, AttentionState):
        raise TypeError(f"state is {type(state).__name__}. Valid: a svg2_compile.AttentionState, one for a model.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}. Valid: a tensor [B, H, N, D].")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}. Valid: four axes, [B, H, N, D].")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}. Valid: as query, {query.dtype} on {query.device}."
            )
    batch, heads, _, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width or heads % max(1, key.shape[1]):
        raise ValueError(
            f"key has shape {list(key.shape)}. Valid: [{batch}, G, N, {width}] with {heads} heads of query a multiple "
            "of G."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {list(value.shape)}. Valid: as key, {list(key.shape[:3])} and any width.")
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask is {type(attn_mask).__name__}. Valid: a tensor or None.")
    if attn_mask is not None and attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}. Valid: the device of query, {query.device}.")
