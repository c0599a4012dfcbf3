"""Reads time from the inputs of a graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from svg2_compile.runtime.clock import TimeReading

__all__ = ["TimeReader"]

# How many numbers of a modulation tensor are compared to tell one timestep from another.
_SAMPLES = 8


class TimeReader:
    """Reads time from the inputs of a graph: at most one host read for each model call.

    Args:
        kind: "timestep" or "modulation" (see TimeReading).
        positions: which inputs of the graph tell.
    """

    def __init__(self, kind: str, positions: Sequence[int]) -> None:
        self.kind = kind
        self.positions = tuple(positions)
        self._seen: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._reading = TimeReading(kind, ())
        self.reads = 0

    def read(self, args: Sequence[Any]) -> TimeReading:
        """The reading of this call; ``reads`` counts the host reads, which tells model calls apart."""
        inputs = [args[position] for position in self.positions]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.numel()]
        numbers = tuple(float(value) for value in inputs if isinstance(value, (int, float)))
        if not tensors:
            self.reads += 1
            return TimeReading(self.kind, numbers)
        # A block compiled alone is handed one tensor object for all layers of a model call: reading it once is enough.
        # A timestep is read at every call, which is once per model call: users may refill one tensor in place.
        if self.kind == "timestep" or not self._same(tensors):
            self._reading = TimeReading(self.kind, numbers + self._host_read(tensors))
            self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]
            self.reads += 1
        return self._reading

    def _same(self, tensors: list[torch.Tensor]) -> bool:
        if len(tensors) != len(self._seen):
            return False
        return all(
            reference() is tensor and version == _version(tensor)
            for tensor, (reference, version) in zip(tensors, self._seen, strict=True)
        )

    def _host_read(self, tensors: list[torch.Tensor]) -> tuple[float, ...]:
        with torch.no_grad():
            if self.kind == "timestep":
                # Image-to-video models give clean frames the timestep 0: the largest is the schedule's.
                samples = [tensor.detach().to(torch.float64).amax().reshape(1) for tensor in tensors]
            else:
                samples = [_sample(tensor.detach()) for tensor in tensors]
            return tuple(torch.cat(samples).tolist())


def _version(tensor: torch.Tensor) -> int:
    """The mutation count of a tensor; tensors made under inference_mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few numbers spread over a tensor, as float64."""
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    return flat[::stride][:_SAMPLES].to(torch.float64)
