"""The tables about first-order compensation, from what bench.quality.campaign and bench.quality.first_order wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.common import markdown
from bench.quality.results import BEFORE, FIRST, NO_MEMBERS, PUBLISHED_DENSE_LAYERS, dense_layers_of

__all__ = ["SHOWN", "layers_table", "parts_table", "psnr_table", "schedules_table", "shown_rows", "sizes_table"]

SHOWN = {
    "svg2": "SVG2, skipped clusters dropped",
    "global slope": "a global slope beside centroids (as PISA)",
    BEFORE: "SVG-EAR: centroids, budget per row (the default before)",
    "tiles+first_order": "first order, layer's budget, on blocks by position",
    NO_MEMBERS: "first order, layer's budget by variances alone",
    FIRST: "first order, layer's budget (the default)",
}
PARTS = ("P", "A + B", "A + B + J", "P + A", "P + A + B", "P + J", NO_MEMBERS)
STEPS = 20
SCHEDULES = (
    ("20 steps", {"steps": 20}),
    ("20 steps, the first layer dense", {"steps": 20, "dense_layers": PUBLISHED_DENSE_LAYERS}),
    ("20 steps, the last one dense", {"steps": 20, "dense_last_steps": 1}),
    ("20 steps, density 0.15..0.05", {"steps": 20, "requested_density": "0.15..0.05"}),
    ("20 steps, density 0.05..0.15", {"steps": 20, "requested_density": "0.05..0.15"}),
    ("8 steps", {"steps": 8}),
    ("4 steps", {"steps": 4}),
)
BASE = "centroid, row"


def _found(document: Mapping[str, Any], **wanted: Any) -> Mapping[str, Any] | None:
    """The row of the results with these values; None if it was not measured."""
    wanted = {"dense_last_steps": 0, **wanted}
    rows = (row for row in document["results"] if all(row[key] == value for key, value in wanted.items()))
    return next(rows, None)


def shown_rows(document: Mapping[str, Any], method: str) -> dict[float, Mapping[str, Any]]:
    """The rows of a method as it is shown, by its density."""
    point = (method, STEPS, dense_layers_of(method), 0)
    return {
        row["requested_density"]: row
        for row in document["results"]
        if (row["method"], row["steps"], row["dense_layers"], row["dense_last_steps"]) == point
        and isinstance(row["requested_density"], float)
    }


def _psnr(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    count = len(row["prompts"])
    return f"{row['psnr_mean']:.1f} ± {row['psnr_std']:.1f} ({count})"


def psnr_table(document: Mapping[str, Any]) -> str:
    """PSNR by method and density, and every prompt of the default beside the one before."""
    densities = sorted({d for d in (row["requested_density"] for row in document["results"]) if isinstance(d, float)})
    shown = {method: shown_rows(document, method) for method in SHOWN}
    rows = [[label, *(_psnr(shown[method].get(d)) for d in densities)] for method, label in SHOWN.items()]
    size = f"{document['frames']}x{document['height']}x{document['width']} pixels, {document['tokens']:,} tokens"
    about = f"{size}, {STEPS} steps; mean ± deviation in dB, in brackets the number of prompts."
    parts = [about, markdown(["", *(f"{density:.0%}" for density in densities)], rows)]
    now, before = shown[FIRST].get(0.10), shown[BEFORE].get(0.25)
    if now is not None and before is not None:
        shared = [prompt for prompt in now["prompts"] if prompt in before["prompts"]]
        each = [
            ["the default at 10 %", *_of_prompts(now, shared)],
            ["the default before at 25 %", *_of_prompts(before, shared)],
        ]
        parts += ["**Prompt by prompt, PSNR in dB**", markdown(["", *(f"prompt {p}" for p in shared)], each)]
    return "\n\n".join(parts)


def _of_prompts(row: Mapping[str, Any], prompts: Sequence[int]) -> list[str]:
    values = dict(zip(row["prompts"], row["psnr_per_prompt"], strict=True))
    return [f"{values[prompt]:.1f}" for prompt in prompts]


def parts_table(document: Mapping[str, Any]) -> str:
    """PSNR and flicker of the parts, alone and together, all with the first layer dense."""
    labels = {BEFORE: "none (the default before)", FIRST: "P + A + B + J"}
    point = {"steps": STEPS, "dense_layers": PUBLISHED_DENSE_LAYERS}
    rows = []
    for method in (BEFORE, *PARTS, FIRST):
        found = [_found(document, method=method, requested_density=density, **point) for density in (0.10, 0.25)]
        flicker = "not measured" if found[0] is None else f"{found[0]['flicker_mean']:.4f}"
        rows.append([labels.get(method, method), *map(_psnr, found), flicker])
    return markdown(["parts", "PSNR at 10 %", "PSNR at 25 %", "flicker at 10 %"], rows)


def schedules_table(document: Mapping[str, Any]) -> str:
    """Short schedules, other dense steps and layers, and densities that change, over the prompts that each has."""
    usual: dict[str, Any] = {"dense_layers": dense_layers_of(FIRST), "requested_density": 0.10}
    usual_before = {"dense_layers": dense_layers_of(BEFORE), "requested_density": 0.25}
    rows = []
    for label, point in SCHEDULES:
        now = _found(document, method=FIRST, **{**usual, **point})
        before = _found(document, method=BEFORE, **{**point, **usual_before})
        flicker = "not measured" if now is None else f"{now['flicker_mean']:.4f}"
        plain = "-" if {"requested_density", "dense_layers"} & point.keys() else _psnr(before)
        rows.append([label, _prompt(now, 0), _psnr(now), flicker, plain])
    header = ["schedule", "prompt 0", "the default at 10 %", "its flicker", "the default before at 25 %"]
    return markdown(header, rows)


def _prompt(row: Mapping[str, Any] | None, prompt: int) -> str:
    """PSNR of one prompt, so that rows with different prompts can be compared."""
    if row is None or prompt not in row["prompts"]:
        return "not measured"
    return f"{dict(zip(row['prompts'], row['psnr_per_prompt'], strict=True))[prompt]:.1f}"


def layers_table(document: Mapping[str, Any]) -> str:
    """Output error over that of centroids with a budget per row: mean over layers, and the worst layer's."""
    layers = document["results"]
    rows = []
    for name in layers[0]["error"]:
        if name == "density":
            continue
        mine, base = (np.array([layer["error"][key] for layer in layers]) for key in (name, BASE))
        if name == BASE:
            cells = [f"{value:.4f} (the error itself)" for value in base.mean(axis=0)]
        else:
            mean, worst = mine.mean(axis=0) / base.mean(axis=0), (mine / base).max(axis=0)
            cells = [f"{ratio:.2f} ({most:.2f})" for ratio, most in zip(mean, worst, strict=True)]
        rows.append([name, *cells])
    prompts = ", ".join(str(prompt) for prompt in document["prompts"])
    steps = ", ".join(map(str, document["steps"]))
    about = f"Prompts {prompts}, steps {steps}, every layer, {document['tokens']:,} tokens."
    header = ["parts", *(f"at {density:.0%}: mean (worst layer)" for density in document["densities"])]
    return f"{about}\n\n{markdown(header, rows)}"


def sizes_table(document: Mapping[str, Any]) -> str:
    """Clustered inputs: output error before, and the ratio to it by parts, at 10 and 25 %."""
    names = ("P", "A + B", "P + A + B", "P + A + B + J", "P + A + B + J0")
    places = [list(document["densities"]).index(density) for density in (0.10, 0.25)]
    rows = []
    for row in document["results"]:
        error = row["error"]
        cells = [f"{row['num_tokens']:,}, {row['head_dim']}, {row['spread']}"]
        cells.append(" / ".join(f"{error[BASE][place]:.3f}" for place in places))
        cells += [" / ".join(f"{error[name][place] / error[BASE][place]:.2f}" for place in places) for name in names]
        rows.append(cells)
    return markdown(["tokens, head_dim, spread", "error before, 10 / 25 %", *names], rows)
