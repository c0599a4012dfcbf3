"""What a result was made with, in words: versions of packages, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

__all__ = ["describe_device", "version_of"]


def version_of(package: str) -> str | None:
    """The version that is installed; None if none is."""
    if package == "torch":
        return str(torch.__version__)  # the installed metadata leaves out the build (+cpu, +cu130)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return (
        f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
