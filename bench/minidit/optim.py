"""How the weights are learned: Muon for the matrices of the blocks, AdamW for the rest, and a schedule in three parts.

The learning rate warms up, stays, and decays to zero over the last steps. The constant part may go on for as long as
there is time; the decay can be asked for at any step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MATRIX_LEARNING_RATE = 3e-3
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' weight matrices; fused AdamW over embeddings, gains, biases, modulation and output."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    # match_rms_adamw gives Muon's updates the size of AdamW's, so that the two rates are comparable
    muon = torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers: list[torch.optim.Optimizer] = [muon, adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, decay_start: int | None, decay_steps: int) -> float:
    """The factor of the base learning rates at ``step``, counted from zero.

    Linear warm-up, constant, then 1 - sqrt towards zero, which reaches zero at ``decay_start + decay_steps``.
    """
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    if decay_start is None or step < decay_start:
        return warm
    done = min(1.0, (step - decay_start) / max(1, decay_steps))
    return warm * (1 - done**0.5)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class WeightAverage:
    """An exponential moving average of a model's weights, float32, short-memoried at the beginning.

    Its memory, a few hundred steps, is shorter than the decay of the learning rate, which averages better.
    """

    def __init__(self, model: nn.Module, decay: float = 0.997) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [state[name] for name in self.weights], 1 - decay)
