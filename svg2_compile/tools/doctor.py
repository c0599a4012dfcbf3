"""``svg2 doctor``: is everything here that sparse attention needs, and does it compute the right numbers?"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from svg2_compile.codegen.inner_backend import NEXT_BEST, inductor_problem
from svg2_compile.reporting.machine import describe_device, version_of

__all__ = ["Check", "Diagnosis", "diagnose"]

_PACKAGES = ("svg2-compile", "torch", "triton", "diffusers", "transformers", "sympy", "networkx", "numpy")

# Odd on purpose: a multiple of no block size. 37 text tokens after the video, a sixth of the keys masked.
_BATCH, _HEADS, _HEAD_DIM, _VIDEO_TOKENS, _CONTEXT_TOKENS = 2, 3, 40, 219, 37
_QUERY_CLUSTERS, _KEY_CLUSTERS, _ITERS = 7, 13, 3
# float32 sums of about 256 terms in two orders; both differ from float64 by less than this.
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Check:
    """One thing that was tried. status: "ok", "warning" (works, but slower or with less) or "failed"."""

    name: str
    status: str
    detail: str


@dataclass
class Diagnosis:
    """What ``diagnose`` found. versions: package -> version or None if it is not installed. devices: in words."""

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **asdict(self)}

    def __rich__(self) -> Group:
        versions = Table(title="svg2 doctor: versions and devices", title_justify="left", show_header=False)
        for name, version in self.versions.items():
            versions.add_row(name, version or "not installed")
        for device in self.devices:
            versions.add_row("device", device)
        checks = Table(title="checks", title_justify="left")
        for header in ("check", "status", "detail"):
            checks.add_column(header, overflow="fold")
        styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
        for check in self.checks:
            checks.add_row(check.name, Text(check.status, styles[check.status]), check.detail)
        return Group(versions, checks)

    def __str__(self) -> str:
        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def diagnose() -> Diagnosis:
    """Look at versions, devices and compilers, and compare sparse with dense attention on every device."""
    diagnosis = Diagnosis(versions={"python": platform.python_version()})
    for package in _PACKAGES:
        diagnosis.versions[package] = version_of(package)
    devices = _devices()
    diagnosis.devices = [describe_device(device) for device in devices]
    diagnosis.checks.append(_check_entry_point())
    diagnosis.checks += [_check_inductor(device) for device in devices]
    diagnosis.checks.append(_check_native())
    diagnosis.checks += [_check_numbers(device) for device in devices]
    diagnosis.checks += [_check_tuning(device) for device in devices]
    return diagnosis


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


def _check_entry_point() -> Check:
    """torch.compile finds the backend by an entry point, which only an installed package has."""
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="svg2")
    if found:
        return Check('backend="svg2"', "ok", "torch.compile finds it without an import")
    return Check('backend="svg2"', "failed", "no entry point: install the package (pip install -e .)")


def _check_inductor(device: torch.device) -> Check:
    name = f"Inductor on {device}"
    problem = inductor_problem(device.type)
    if problem is not None:
        return Check(name, "warning", f"{problem}; inner_backend={NEXT_BEST!r} is used instead")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        return Check(name, "ok", f"C++ compiler: {get_cpp_compiler()}")
    return Check(name, "ok", f"Triton {version_of('triton')}")


def _check_native() -> Check:
    """The CPU kernels in C++, compiled at first use: without them ATen calls compute the same, slower."""
    from svg2_compile.kernels.cpu.native.build import native

    found = native()
    status = "ok" if found.library is not None or found.switched_off else "warning"
    without = "" if found.library is not None else "; ATen calls are used instead"
    return Check("native code on cpu", status, f"{found.detail}{without}")


def _check_tuning(device: torch.device) -> Check:
    """Not being tuned is no fault: the defaults are right, and the time they lose is unknown."""
    from svg2_compile.kernels.tuning.lookup import device_name
    from svg2_compile.kernels.tuning.tables import load_tables

    measured = sum(len(table.measurements) for table in load_tables(device_name(device)))
    found = f"{measured} tuned configurations" if measured else "safe defaults; `svg2 tune` looks for faster ones"
    return Check(f"tile sizes on {device}", "ok", found)


def _check_numbers(device: torch.device) -> Check:
    """Sparse attention that keeps every block must equal dense attention in float64, whatever the clusters are."""
    name = f"numbers on {device}"
    try:
        error = sparse_error(device)
    except Exception as problem:  # noqa: BLE001 - a doctor reports whatever goes wrong
        return Check(name, "failed", f"{type(problem).__name__}: {problem}")
    detail = f"top_p=1 against dense attention: largest error {error:.1e}, allowed {_TOLERANCE:.0e}"
    return Check(name, "ok" if error <= _TOLERANCE else "failed", detail)


def sparse_error(device: torch.device) -> float:
    """The largest deviation of sparse attention with top_p=1 from dense attention in float64; inf for NaN."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = _VIDEO_TOKENS + _CONTEXT_TOKENS
    shape = (_BATCH, _HEADS, num_tokens, _HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    valid = torch.ones(_BATCH, 1, num_tokens, dtype=torch.bool)
    valid[1, :, -num_tokens // 6 :] = False
    valid = valid.to(device)
    out = _sparse_attention(query, key, value, valid)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=valid.unsqueeze(-2)
    )
    error = (out.double() - exact).abs().max().item()
    return error if math.isfinite(error) else math.inf


def _sparse_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The operators in the order in which the compiler emits them; [B, H, N, D] each, valid [B, 1, N]."""
    import svg2_compile.kernels.ops  # noqa: F401  (registers the operators)

    ops = torch.ops.svg2
    num_tokens, scale = query.shape[2], query.shape[3] ** -0.5

    def cluster(tokens: torch.Tensor, num_clusters: int, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        video = tokens[:, :, :_VIDEO_TOKENS]
        cold = video.new_zeros(*video.shape[:2], num_clusters, video.shape[3])
        unseeded = torch.zeros((), dtype=torch.bool, device=video.device)
        video_mask = None if mask is None else mask[..., :_VIDEO_TOKENS]
        labels, centroids, sizes = ops.kmeans(video, cold, unseeded, _ITERS, video_mask)
        order, offsets = ops.cluster_order(labels, num_clusters, 0, num_tokens, mask)
        return centroids, sizes, order, offsets

    q_centroids, q_sizes, q_order, q_offsets = cluster(query, _QUERY_CLUSTERS, None)
    k_centroids, k_sizes, k_order, k_offsets = cluster(key, _KEY_CLUSTERS, valid)
    block_map = ops.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, scale, 1.0, 0.0)
    permuted = (ops.permute_tokens(x, k_order) for x in (key, value))
    out, _ = ops.block_sparse_attention(query, *permuted, q_offsets, k_offsets, block_map, scale, q_order=q_order)
    return out
