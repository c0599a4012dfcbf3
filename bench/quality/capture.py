"""Query, key and value of every self-attention of the small model, taken while it really samples a video."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from svg2_compile.minidit.model import VideoSize, sample_videos
from svg2_compile.minidit.prompts import Prompt

__all__ = ["Attention", "watch_attention"]

_SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Attention:
    """One self-attention over the video's tokens: query, key and value float32 [1, H, N, D] after rotary embedding, and
    what dense attention made of them."""

    layer: int
    step: int
    query: Tensor
    key: Tensor
    value: Tensor
    dense: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)


class _Watch(TorchFunctionMode):
    """Hands every self-attention of the conditional branch at the chosen steps to ``consume``, and keeps none."""

    def __init__(
        self, num_tokens: int, num_layers: int, steps: Collection[int], consume: Callable[[Attention], None]
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_layers = num_tokens, num_layers
        self.steps, self.consume = frozenset(steps), consume
        self.step, self.calls = 0, 0

    def next_step(self, step: int) -> None:
        """Step ``step`` is done."""
        if self.calls % self.num_layers:
            raise RuntimeError(
                f"step {step} ran {self.calls} self-attentions over {self.num_tokens} video tokens; "
                f"expected a multiple of the {self.num_layers} layers"
            )
        self.step, self.calls = step + 1, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _SDPA:
            self._take(*_inputs(*args, **(kwargs or {})), out)
        return out

    def _take(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        if not query.shape[2] == key.shape[2] == self.num_tokens:
            return  # attention to the prompt
        layer = self.calls
        self.calls += 1
        # Within a step the prompt's branch comes first, then the one without a prompt, which is not measured.
        if self.step in self.steps and layer < self.num_layers:
            self.consume(Attention(layer, self.step, query.float(), key.float(), value.float(), out.float()))


def _inputs(query: Tensor, key: Tensor, value: Tensor, *_rest: Any, **_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def watch_attention(
    model: nn.Module,
    prompt: Prompt | str,
    seed: int,
    size: VideoSize,
    sampling_steps: int,
    guidance: float,
    steps: Collection[int],
    consume: Callable[[Attention], None],
) -> Tensor:
    """Sample one video densely; give ``consume`` every self-attention of the denoising steps ``steps``, in order.

    Memory stays that of one attention, whatever is watched: ``consume`` works while the model waits.

    Returns:
        The video [3, frames, height, width].

    Raises:
        ValueError: for a step that the sampling does not have.
        RuntimeError: if the model does not run one self-attention per layer.
    """
    wrong = sorted(step for step in steps if not 0 <= step < sampling_steps)
    if wrong:
        raise ValueError(f"watch_attention: steps has {wrong}; valid: 0 to {sampling_steps - 1}")
    blocks = model.get_submodule("blocks")
    with _Watch(size.tokens, len(list(blocks.children())), steps, consume) as watch:
        videos = sample_videos(model, [prompt], [seed], size, sampling_steps, guidance, after_step=watch.next_step)
    return videos[0]
