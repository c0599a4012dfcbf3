"""Reads time from the inputs of a graph, or from the arguments of a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TimeReader", "TimeReading", "named_timesteps", "timestep_reading"]

# How many numbers of a modulation tensor are compared to tell one timestep from another.
_SAMPLES = 8

# What models call the argument that carries the timestep or the noise level.
_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")


@dataclass(frozen=True)
class TimeReading:
    """What a call's inputs tell about time.

    kind: "timestep" (the largest timestep, then the mean where there are several) or "modulation" (samples of tensors
    made from it). values: empty if no input tells.
    """

    kind: str
    values: tuple[float, ...]


def named_timesteps(arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments of a model that carry timesteps, by their names; empty where none is called so."""
    for name in _NAMES:
        value = arguments.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return [value]
        if isinstance(value, torch.Tensor) and value.numel() and not value.dtype.is_complex:
            return [value]
    return []


def timestep_reading(inputs: Sequence[Any]) -> TimeReading:
    """Reads timesteps, which is one host read where they lie on a device.

    Image-to-video models give clean frames the timestep 0, and diffusion forcing gives every frame its own: the largest
    is the schedule's, and the mean moves where that stands.
    """
    numbers = [float(value) for value in inputs if isinstance(value, (int, float))]
    tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.numel()]
    if not tensors:
        return TimeReading("timestep", tuple(numbers))
    if len(tensors) == 1 and tensors[0].numel() == 1:
        return TimeReading("timestep", (*numbers, float(tensors[0].item())))
    with torch.no_grad():
        flat = [tensor.detach().to(torch.float64).reshape(-1) for tensor in tensors]
        pairs = [torch.stack((values.amax(), values.mean())) for values in flat]
        return TimeReading("timestep", (*numbers, *torch.cat(pairs).tolist()))


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
        """The reading of this call; ``reads`` counts the host reads."""
        inputs = [args[position] for position in self.positions]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.numel()]
        # A block compiled alone is handed one tensor object for all layers of a model call: reading it once is enough.
        # A timestep is read at every call, which is once per model call: users may refill one tensor in place.
        if self.kind == "timestep" or not tensors:
            self.reads += 1
            reading = timestep_reading(inputs)
            return reading if self.kind == "timestep" else TimeReading(self.kind, reading.values)
        if not self._same(tensors):
            numbers = tuple(float(value) for value in inputs if isinstance(value, (int, float)))
            with torch.no_grad():
                samples = torch.cat([_sample(tensor.detach()) for tensor in tensors]).tolist()
            self._reading = TimeReading(self.kind, (*numbers, *samples))
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


def _version(tensor: torch.Tensor) -> int:
    """The mutation count of a tensor; tensors made under inference_mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few numbers spread over a tensor, as float64."""
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES)
    return flat[::stride][:_SAMPLES].to(torch.float64)
