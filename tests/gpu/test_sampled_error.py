"""The measured error on the device against the oracle in float64."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import ops
from tests.gpu.support import moved, poisoned, sized
from tests.kernels.sampled_error_cases import SHAPES, arguments, check

LONG = {"num_queries": sized(3000, 130), "num_keys": sized(5000, 170), "head_dim": sized(128, 16)}


@pytest.mark.parametrize("shape", [*SHAPES, "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments(32, noise=0.1, dtype=dtype, **{**SHAPES, "long": LONG}[shape])
    found = poisoned(device, ops.sampled_error, *moved(args, device))
    check(args, found, unit=2.0**-20 if dtype == torch.float32 else 2e-3)
