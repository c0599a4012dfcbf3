"""What a file costs: seconds to transform, save and load, and bytes against PyTorch's own file of the same program."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import svg2_compile
from bench.common import require_close
from bench.compile_time import model_and_inputs
from tests.support import IDENTITY, first_output
from tests.zoo.models import ZOO, build

# Without what torch.export does not take, or takes wrong: hunyuan_video15 decides by values, and of cogvideox's
# position embedding a tensor without values is left.
MODELS = tuple(name for name in ZOO if name not in ("hunyuan_video15", "cogvideox"))

Result = TypeVar("Result")


def zoo_row(name: str, folder: Path) -> dict[str, Any]:
    """One of diffusers' transformers in a small configuration."""
    module, inputs = build(name)
    return {"part": "files", "model": name, **_row(module, inputs, folder)}


def depth_row(layers: int, folder: Path) -> dict[str, Any]:
    """A Wan transformer of many narrow layers: what grows with the number of operators."""
    module, inputs = model_and_inputs(layers)
    return {"part": "depth", "model": f"wan, {layers} layers", **_row(module, inputs, folder)}


def _row(module: nn.Module, inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    theirs, mine = folder / "exported.pt2", folder / "transformed.pt2"
    with torch.no_grad():
        export_s, exported = _timed(lambda: torch.export.export(module, (), inputs))
    transform_s, program = _timed(lambda: svg2_compile.transform(exported, **IDENTITY))
    save_s, _ = _timed(lambda: svg2_compile.save(program, mine))
    load_s, loaded = _timed(lambda: svg2_compile.load(mine))
    torch.export.save(exported, theirs)
    torch_load_s, _ = _timed(lambda: torch.export.load(theirs))
    with torch.no_grad():
        expected = first_output(module, inputs)
    error = require_close("loaded program", first_output(loaded, inputs), expected, 1e-4)
    tensors = [*exported.state_dict.values(), *exported.constants.values()]
    weights = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return {
        "operators": len(exported.graph.nodes),
        "attentions": len(program.sites),
        "sparse": len(program.sparse_sites),
        "export_s": round(export_s, 2),
        "transform_s": round(transform_s, 3),
        "save_s": round(save_s, 2),
        "load_s": round(load_s, 2),
        "torch_load_s": round(torch_load_s, 2),
        "weights_kib": round(sum(weights.values()) / 2**10, 1),
        "file_kib": round(mine.stat().st_size / 2**10, 1),
        "exported_kib": round(theirs.stat().st_size / 2**10, 1),
        "file_over_exported": round(mine.stat().st_size / theirs.stat().st_size, 3),
        "relative_error": float(f"{error:.1e}"),
    }


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result
