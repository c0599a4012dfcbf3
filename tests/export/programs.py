"""Exported programs that several tests share. Exporting is the slow part: each program is exported once per process."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from svg2_compile.export.archive import MANIFEST
from tests.zoo.models import build

TOKENS, CHANNELS = 96, 32
# (strict, run_decompositions): the forms in which a program arrives.
FORMS = {"as exported": (False, False), "strict": (True, False), "decomposed": (False, True)}


@functools.cache
def exported(name: str, form: str = "as exported") -> ExportedProgram:
    """A model of the zoo as an exported program; its inputs are those of ``build``."""
    strict, decompose = FORMS[form]
    module, inputs = build(name)
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, strict=strict)
    return program.run_decompositions() if decompose else program


class Attention(nn.Module):
    """Self-attention with 2 heads over tokens [B, N, 32], modulated by a timestep [B]."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.register_buffer("shift", torch.linspace(-1, 1, CHANNELS), persistent=False)

    def attend(self, video: Tensor, time: Tensor) -> Tensor:
        tokens = video + time.sin()[:, None, None] * self.shift
        heads = self.qkv(tokens).unflatten(2, (3, 2, CHANNELS // 2)).permute(2, 0, 3, 1, 4)
        return video + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Block(Attention):
    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        return self.attend(video, time)


def block(kind: type[Attention] = Block) -> Attention:
    """A block, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def block_inputs(tokens: int = TOKENS, batch: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Video and time for a block."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, CHANNELS, generator=generator), torch.full((batch,), 9.0)


@functools.cache
def exported_block() -> ExportedProgram:
    return torch.export.export(block(), block_inputs())


def first(output: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return output[0] if isinstance(output, tuple) else output


def runs_of(report: Any, every: int = 1) -> list[tuple[Any, ...]]:
    """(graph, video, step, context, seeded) of every call, for the first of ``every`` sites."""
    return [(run.graph, run.video, run.step, run.context, run.seeded) for run in report.runs[::every]]


def changed_manifest(path: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a file with its manifest changed."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            if name == MANIFEST:
                manifest = json.loads(data)
                change(manifest)
                data = json.dumps(manifest).encode()
            copy.writestr(name, data)
    return target
