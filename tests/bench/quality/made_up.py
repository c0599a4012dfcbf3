"""Made-up results of the benchmarks of first-order compensation."""

from __future__ import annotations

from typing import Any

from bench.quality.campaign import summary
from bench.quality.results import BEFORE, FIRST, dense_layers_of


def made_up_campaign() -> dict[str, Any]:
    """Two methods at two densities, of two and three prompts, and one of them in 8 steps, and with a dense layer."""
    rows = [
        row(method, density, prompt, 20)
        for method, prompts in ((BEFORE, (2, 0)), (FIRST, (0, 1, 2)))
        for density in (0.10, 0.25)
        for prompt in prompts
    ]
    size = {"frames": 16, "height": 64, "width": 64, "tokens": 4096}
    return {**size, "results": summary([*rows, row(FIRST, 0.10, 0, 8), row(FIRST, 0.10, 1, 20, 0.03)])}


def row(method: str, density: float, prompt: int, steps: int, dense_layers: float | None = None) -> dict[str, Any]:
    psnr = 20 + 40 * density + prompt + (8.0 if method == FIRST else 0.0)
    measured = {"psnr": psnr, "ssim": 0.9, "ms_ssim": 0.95, "flicker": 0.01, "seconds": 60.0}
    point = {"method": method, "requested_density": density, "prompt": prompt, "steps": steps}
    layers = dense_layers_of(method) if dense_layers is None else dense_layers
    point |= {"dense_layers": layers, "dense_last_steps": 0}
    return {**point, "density": density + 0.001, **measured}


def made_up_layers() -> dict[str, Any]:
    names = ("centroid, row", "P", "A + B", "P + A + B", "P + A + B + J", "P + A + B + J0")
    layers = [
        {"layer": layer, "error": {"density": [0.1, 0.25], **{n: [0.1 / (i + 1), 0.05] for i, n in enumerate(names)}}}
        for layer in range(3)
    ]
    queries = {name: [0.5, 1.0, 1.5, 2.0] for name in ("distance", "centroid", "A + B", "A + B + J")}
    about = {"prompts": [3], "steps": [4], "tokens": 4096, "densities": [0.10, 0.25], "queries": queries}
    return {**about, "drawn": {"step": 4, "layer": 1, "density": 0.1}, "results": layers}
