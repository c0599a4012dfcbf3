"""Train the small model on synthetic video.

    python -m bench.minidit.train --out FOLDER --threads 2
    python -m bench.minidit.train --out FOLDER --threads 2 --finish 600    # decay the learning rate to zero, then stop

Training goes on from FOLDER's checkpoint where there is one. It writes one every few minutes and when it is told to
stop (SIGTERM, SIGINT); ``log.jsonl`` there gets a line per step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bench.minidit.data import make_batch
from bench.minidit.optim import WeightAverage, build_optimizers, learning_rate_factor, set_learning_rate
from bench.minidit.stages import choice_at, stage_at
from svg2_compile.minidit.model import TIMESTEPS, VideoSize, build_model, shifted, timestep_shift, with_coordinates

CLIP_NORM = 1.0
UNIFORM_TIMES = 0.15
"""Share of the noise levels drawn evenly, so that none is rare; the rest are logit-normal."""


def draw_times(batch: int, shift: float, generator: Generator) -> Tensor:
    """Noise levels of a batch, spread evenly over their distribution's quantiles: (batch,) float32 in (0, 1)."""
    quantiles = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    quantiles = quantiles.clamp(1e-4, 1 - 1e-4)
    normal = torch.special.ndtri(quantiles).sigmoid()
    even = torch.rand(batch, generator=generator) < UNIFORM_TIMES
    return torch.where(even, quantiles, shifted(normal, shift))


def flow_loss(model: nn.Module, videos: Tensor, conditions: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, in bfloat16 autocast. Returns a scalar, float32."""
    t = times.view(-1, 1, 1, 1, 1)
    noisy = (1 - t) * videos + t * noise
    with torch.autocast(videos.device.type, torch.bfloat16):
        velocity = model(with_coordinates(noisy), times * TIMESTEPS, conditions, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - videos)


class Trainer:
    """The state of a training run: everything that a checkpoint holds."""

    def __init__(self, out: Path, device: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.out, self.device = out, torch.device(device)
        self.model = build_model().to(self.device).train()
        self.optimizers = build_optimizers(self.model)
        self.average = WeightAverage(self.model)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.decay_start: int | None = None
        self.decay_steps = 0

    def finish_within(self, steps: int) -> None:
        """Decay the learning rate to zero over the next ``steps``. A decay that is under way goes on as planned."""
        if self.decay_start is None:
            self.decay_start, self.decay_steps = self.step, steps

    @property
    def finished(self) -> bool:
        return self.decay_start is not None and self.step >= self.decay_start + self.decay_steps

    def batch(self, count: int, size: VideoSize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Videos, conditions, noise levels and noise on the device."""
        videos, conditions = make_batch(count, size, self.generator)
        times = draw_times(count, timestep_shift(size.tokens), self.generator)
        noise = torch.randn(videos.shape, generator=self.generator)
        return tuple(x.to(self.device) for x in (videos, conditions, times, noise))  # type: ignore[return-value]

    def train_step(self) -> dict[str, Any]:
        """One step of the curriculum. Returns what is logged of it."""
        began = time.perf_counter()
        choice = choice_at(self.step)
        videos, conditions, times, noise = self.batch(choice.batch, choice.size)
        made = time.perf_counter()
        loss = flow_loss(self.model, videos, conditions, times, noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        factor = learning_rate_factor(self.step, self.decay_start, self.decay_steps)
        set_learning_rate(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model, self.step)
        self.step += 1
        size = choice.size
        return {
            "step": self.step,
            "stage": stage_at(self.step - 1),
            "size": [choice.batch, size.frames, size.height, size.width],
            "loss": round(loss.item(), 5),
            "grad_norm": round(float(norm), 4),
            "lr": factor,
            "data_s": round(made - began, 3),
            "s": round(time.perf_counter() - began, 3),
        }

    def save(self) -> None:
        """Write the checkpoint; a reader, or a crash, finds either the old one or the new one."""
        state = {
            "step": self.step,
            "decay": (self.decay_start, self.decay_steps),
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }
        partial = self.out / "checkpoint.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from the folder's checkpoint. Returns whether there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.decay_start, self.decay_steps = state["decay"]
        self.model.load_state_dict(state["model"])
        self.average.weights = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            rates = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["base_lr"] = rate  # the code's, so that a rate can be changed between runs
        self.generator.set_state(state["generator"].cpu())
        return True


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks, which share one compilation per shape of the curriculum."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)


def run(trainer: Trainer, steps: int | None, save_minutes: float) -> None:
    """Train until ``steps`` are done, the decay has ended or a signal asks to stop; then write the checkpoint."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stop.append(received))
    last = trainer.step + steps if steps is not None else None
    saved = time.monotonic()
    with (trainer.out / "log.jsonl").open("a") as log:
        while not stop and not trainer.finished and (last is None or trainer.step < last):
            record = trainer.train_step()
            log.write(json.dumps(record) + "\n")
            log.flush()
            if time.monotonic() - saved > 60 * save_minutes:
                trainer.save()
                saved = time.monotonic()
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument(
        "--finish", type=int, metavar="N", help="decay the learning rate to zero over N steps, then stop"
    )
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments.out, arguments.device)
    resumed = trainer.resume()
    if arguments.finish is not None:
        trainer.finish_within(arguments.finish)
    if arguments.compile:
        compile_blocks(trainer.model)
    print(f"{'going on' if resumed else 'starting'} at step {trainer.step}, {arguments.threads} threads", flush=True)
    run(trainer, arguments.steps, arguments.save_minutes)


if __name__ == "__main__":
    main()
