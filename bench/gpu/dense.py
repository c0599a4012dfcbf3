"""Dense attention, the thing to beat: scaled_dot_product_attention by every kernel that PyTorch has for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.machine import Machine

__all__ = ["Dense", "exact_dense_rows", "find_best_dense"]

_BACKENDS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}


@dataclass(frozen=True)
class Dense:
    """The fastest dense kernel for some tokens. candidates: name -> median milliseconds, or why it did not run."""

    name: str
    backend: SDPBackend
    candidates: dict[str, float | str]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(query, key, value)


def find_best_dense(machine: Machine, query: Tensor, key: Tensor, value: Tensor) -> Dense:
    """Time every dense kernel on these tokens [B, H, N, D]. Raises RuntimeError where none runs."""
    functions: dict[str, Callable[[], object]] = {}
    candidates: dict[str, float | str] = {}
    backends = _BACKENDS[machine.device.type]
    for name, backend in backends.items():
        dense = Dense(name, backend, candidates)
        try:
            dense(query, key, value)
        except RuntimeError as error:  # "No available kernel"
            candidates[name] = f"does not run: {str(error).splitlines()[0]}"
            continue
        functions[name] = functools.partial(dense, query, key, value)
    if not functions:
        raise RuntimeError(f"no dense kernel runs here: {candidates}")
    times = {name: timing.median_ms for name, timing in machine.measure(functions, 3).items()}
    candidates.update({name: round(median, 3) for name, median in times.items()})
    best = min(times, key=times.__getitem__)
    return Dense(best, backends[best], candidates)


def exact_dense_rows(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
    """Softmax attention of the query ``tokens`` of every head in float64: [H, len(tokens), D]."""
    rows = []
    for head in range(query.shape[1]):
        scores = (query[0, head, tokens].double() @ key[0, head].double().T) / math.sqrt(query.shape[-1])
        rows.append(torch.softmax(scores, dim=-1) @ value[0, head].double())
    return torch.stack(rows)
