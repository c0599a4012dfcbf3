"""Pair: two runs, one dense and one sparse, and what was measured of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from svg2_compile.compare.attention_maps import AttentionMaps
from svg2_compile.compare.density import DensityTable, sparse_steps
from svg2_compile.reporting.report import Report

__all__ = ["Pair", "Run", "decibel"]


@dataclass(frozen=True)
class Run:
    """One video [C, F, H, W] in [-1, 1] and the seconds of every denoising step."""

    video: Tensor
    step_seconds: list[float]

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Pair:
    """What differs between a dense and a sparse video, and what each took.

    Attributes:
        name, facts: what was generated: the model; prompt, seed, size, steps ...
        settings: every svg2 option.
        versions, hardware: what it ran on.
        dense, sparse: the runs; compilation is not in their times.
        psnr: dB, of the mean squared error over the whole video; inf where the videos are identical.
        psnr_per_frame, ssim_per_frame: by frame; SSIM is None for frames smaller than 11 x 11.
        ms_ssim: multi-scale SSIM, the stand-in for a perceptual distance.
        density: by layer, step and head.
        report: decisions and records of the sparse run.
        latent: frames are latents, moved to [-1, 1] by the range of the dense ones.
        maps: one attention looked into, if that was asked for.
    """

    name: str
    facts: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str | None]
    hardware: str
    dense: Run
    sparse: Run
    psnr: float
    psnr_per_frame: list[float]
    ssim_per_frame: list[float] | None
    ms_ssim: float | None
    density: DensityTable
    report: Report
    latent: bool = False
    maps: AttentionMaps | None = None

    @property
    def ssim(self) -> float | None:
        """Mean over frames."""
        values = self.ssim_per_frame
        return sum(values) / len(values) if values else None

    @property
    def identical(self) -> bool:
        """Whether no number of the videos differs."""
        return math.isinf(self.psnr)

    @property
    def speedup(self) -> float:
        """Dense time / sparse time of the whole denoising loop."""
        return self.dense.seconds / self.sparse.seconds

    @property
    def speedup_of_sparse_steps(self) -> float | None:
        """The same over the steps that were sparse; None if none was."""
        steps = sparse_steps(self.density)
        if not steps:
            return None
        return sum(self.dense.step_seconds[s] for s in steps) / sum(self.sparse.step_seconds[s] for s in steps)

    def error_per_step(self) -> list[float] | None:
        """Mean measured error of the sparse attentions by step, 0 where all were dense; None where none was."""
        errors = {summary.name: summary.error for summary in self.report.by_step() if summary.error is not None}
        return [errors.get(str(step), 0.0) for step in range(self.density.num_steps)] if errors else None

    @property
    def worst_error(self) -> float | None:
        """The largest measured error of any attention; None where it was not measured."""
        return max((layer.worst for layer in self.report.by_layer() if layer.worst is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain data for JSON; an infinite PSNR is None and ``identical`` true. No frames."""
        return {
            "name": self.name,
            "facts": self.facts,
            "settings": self.settings,
            "versions": self.versions,
            "hardware": self.hardware,
            "identical": self.identical,
            "psnr": _finite(self.psnr),
            "ssim": self.ssim,
            "ms_ssim": self.ms_ssim,
            "psnr_per_frame": [_finite(value) for value in self.psnr_per_frame],
            "ssim_per_frame": self.ssim_per_frame,
            "step_seconds": {"dense": self.dense.step_seconds, "sparse": self.sparse.step_seconds},
            "speedup": self.speedup,
            "speedup_of_sparse_steps": self.speedup_of_sparse_steps,
            "density": self.density.to_dict(),
            "error_per_step": self.error_per_step(),
            "worst_error": self.worst_error,
            "sites": [asdict(site) for site in self.report.sites],
            "latent": self.latent,
            "maps": self.maps.facts() if self.maps else None,
        }

    def __str__(self) -> str:
        density = self.density.mean_sparse
        lines = [f"{self.name}: dense against sparse"]
        if density is None:
            lines.append("no attention was sparse; the reasons are in the report")
        else:
            overall = self.density.mean_overall
            lines.append(f"density   {density:.1%} where sparse, {overall:.1%} over all steps and layers")
        errors, worst = self.error_per_step(), self.worst_error
        if errors is not None and worst is not None:
            sparse = [errors[step] for step in sparse_steps(self.density)]
            lines.append(
                f"error     {sum(sparse) / len(sparse):.2%} of the output where sparse, at most {worst:.2%}, measured"
            )
        lines.append(f"PSNR      {decibel(self.psnr)}")
        if self.ssim is not None and self.ms_ssim is not None:
            lines.append(f"SSIM      {self.ssim:.4f} (multi-scale {self.ms_ssim:.4f})")
        later = self.speedup_of_sparse_steps
        lines.append(
            f"time      dense {self.dense.seconds:.2f} s, sparse {self.sparse.seconds:.2f} s: {self.speedup:.2f}x"
            + (f", {later:.2f}x in the sparse steps" if later is not None else "")
        )
        return "\n".join(lines)


def decibel(value: float) -> str:
    """A PSNR in words."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
