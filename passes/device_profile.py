"""How fast kinds of devices are at what a rewritten attention does: the figures that the cost model multiplies by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from svg2_compile.kernels.dispatch import DEFAULT_IMPLEMENTATION
from svg2_compile.kernels.tuning.lookup import measured_profile

__all__ = ["CPU", "REFERENCE", "DeviceProfile", "profile_for", "profile_named"]


@dataclass(frozen=True)
class DeviceProfile:
    """Throughputs of one kind of device.

    dense_flops, sparse_flops: FLOP/s of dense and block-sparse attention on useful work. kmeans_flops: FLOP/s of the
    assignment. bandwidth: bytes/s of the permutations. cluster_overhead: seconds per query cluster of every (batch,
    head); head_overhead: per (batch, head); call_overhead: per rewritten attention. source: of the figures.
    """

    name: str
    dense_flops: float
    sparse_flops: float
    kmeans_flops: float
    bandwidth: float
    cluster_overhead: float
    head_overhead: float
    call_overhead: float
    source: str

    def having(self, figures: Mapping[str, Any]) -> DeviceProfile:
        """The same with other figures, by their names."""
        return replace(self, **figures)


CPU = DeviceProfile(
    name="cpu",
    dense_flops=1.22e11,
    sparse_flops=1.22e11,
    kmeans_flops=1.2e11,
    bandwidth=2.0e10,
    cluster_overhead=4e-6,
    head_overhead=1e-4,
    call_overhead=1e-3,
    source="fitted to bench/cpu_attention on 2 cores with AVX2: float32, 4,096 to 32,768 tokens, 6 to 50 % density",
)
# Devices without kernels of their own run the readable reference, which is there to be right.
REFERENCE = DeviceProfile(
    name="the reference",
    dense_flops=1.0e14,
    sparse_flops=1.0e9,
    kmeans_flops=1.0e9,
    bandwidth=1e9,
    cluster_overhead=1.0,
    head_overhead=1.0,
    call_overhead=1.0,
    source="no fast kernels for this device",
)
# By the major version of the compute capability.
_GPUS = {
    8: DeviceProfile(
        name="sm_80",
        dense_flops=1.9e14,
        sparse_flops=1.2e14,
        kmeans_flops=1.0e14,
        bandwidth=1.2e12,
        cluster_overhead=0.0,
        head_overhead=2e-6,
        call_overhead=6e-5,
        source="estimate, not measured",
    ),
    9: DeviceProfile(
        name="sm_90",
        dense_flops=6.0e14,
        sparse_flops=4.0e14,
        kmeans_flops=3.0e14,
        bandwidth=2.5e12,
        cluster_overhead=0.0,
        head_overhead=1e-6,
        call_overhead=6e-5,
        source="estimate, not measured",
    ),
}


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device: what `svg2 tune` measured on it, or else that of its kind.

    Unknown GPUs count as the oldest known kind.
    """
    if device.type not in ("cpu", "meta") and DEFAULT_IMPLEMENTATION.get(device.type) == "reference":
        return REFERENCE
    if device.type != "cuda":
        profile = CPU
    else:
        major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9
        profile = _GPUS[min(max(major, min(_GPUS)), max(_GPUS))]
    measured = measured_profile(device)
    if measured is None:
        return profile
    return profile.having({**measured, "source": "measured on this machine by `svg2 tune`"})


def profile_named(name: str) -> tuple[torch.device, DeviceProfile]:
    """A device by its name: "cpu", "cuda" (the one of this machine, or else sm_90), or an architecture, "cuda:sm_80".

    Newer architectures count as the newest known one. The device need not be there.

    Raises:
        ValueError: the name is none of these.
    """
    kind, _, architecture = name.strip().lower().partition(":")
    if kind == "cpu" and not architecture:
        return torch.device("cpu"), profile_for(torch.device("cpu"))
    number = architecture.removeprefix("sm_")
    if kind == "cuda" and not architecture:
        return torch.device("cuda"), profile_for(torch.device("cuda"))
    if kind == "cuda" and architecture.startswith("sm_") and number.isdigit() and int(number) >= 10 * min(_GPUS):
        return torch.device("cuda"), _GPUS[min(int(number) // 10, max(_GPUS))]
    known = ", ".join(repr(f"cuda:{profile.name}") for profile in _GPUS.values())
    raise ValueError(f"device={name!r} is not known. Valid: 'cpu', 'cuda', {known} and newer.")
