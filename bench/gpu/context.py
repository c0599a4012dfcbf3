"""What the parts of the benchmark share within one process: the machine, the shapes, the inputs of the last shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.clustered_inputs import clustered_inputs
from bench.common import Timing
from bench.gpu.dense import Dense, exact_dense_rows, find_best_dense
from bench.gpu.machine import Machine
from bench.gpu.shapes import shapes_for
from bench.rewritten import Inputs, make_inputs
from bench.shape import Shape

__all__ = ["SAMPLED_ROWS", "Context", "Prepared", "relative_error", "sample_rows", "times"]

SAMPLED_ROWS = 64  # per head
# A bfloat16 result has two roundings of 2^-9 relative to a row's largest weight; errors are of the largest value.
TOLERANCE = 2.0**-6


@dataclass(frozen=True)
class Prepared:
    """Tokens, warm centroids and the dense kernel to beat, of one shape."""

    shape: Shape
    inputs: Inputs
    dense: Dense

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs.query, self.inputs.key, self.inputs.value

    def dense_call(self) -> Tensor:
        return self.dense(*self.tokens)


@dataclass
class Context:
    """Handed to every part.

    repeats: timed runs of each function. rehearsal: tiny shapes on a CPU.
    """

    machine: Machine
    repeats: int
    rehearsal: bool
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        return shapes_for(self.rehearsal)[name]

    def prepare(self, name: str) -> Prepared:
        """Inputs of the shape ``name``; those of the shape before are dropped."""
        if name not in self._prepared:
            self._prepared.clear()
            self.machine.release()
            shape = self.shape(name)
            tokens = clustered_inputs(shape, self.machine.device)
            dense = find_best_dense(self.machine, *tokens)
            self._prepared[name] = Prepared(shape, make_inputs(shape, tokens), dense)
        return self._prepared[name]

    def forget(self) -> None:
        """Drop everything that is kept for the next part."""
        self._prepared.clear()
        self.machine.release()


def sample_rows(num_tokens: int, device: torch.device) -> Tensor:
    """Some tokens, the same in every run: int64 [SAMPLED_ROWS]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(num_tokens, generator=generator)[:SAMPLED_ROWS].to(device)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| (Frobenius norms). NaN where anything is not finite."""
    difference = torch.linalg.vector_norm(actual.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


def checked_error(what: str, actual: Tensor, exact: Tensor) -> float:
    """The relative error; AssertionError where it is too large for a bfloat16 result: no speed then."""
    error = relative_error(actual, exact)
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {TOLERANCE:.2e}; no times are reported")
    return float(f"{error:.3e}")


def dense_error(prepared: Prepared, rows: Tensor) -> tuple[float, Tensor]:
    """Relative error of the dense kernel on sampled rows, and the exact rows [H, R, D]."""
    exact = exact_dense_rows(*prepared.tokens, rows)
    return checked_error("dense", prepared.dense_call()[0][:, rows], exact), exact


def times(timing: Timing, flops: float | None = None) -> dict[str, Any]:
    """A timing for JSON; with the TFLOP/s of useful work."""
    described: dict[str, Any] = dict(timing.to_json())
    if flops is not None:
        described["tflops"] = round(flops / timing.median_ms / 1e9, 1)
    return described
