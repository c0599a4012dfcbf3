"""The measured error on the device against the oracle in float64."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import ops
from svg2_compile.passes.error_guard import GIVEN_UP
from svg2_compile.runtime.budgets import late_copy, which_are_given_up
from tests.gpu.support import moved, no_host_synchronisation, poisoned, sized
from tests.kernels.sampled_error_cases import SHAPES, arguments, check

LONG = {"num_queries": sized(3000, 130), "num_keys": sized(5000, 170), "head_dim": sized(128, 16)}


@pytest.mark.parametrize("shape", [*SHAPES, "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments(32, noise=0.1, dtype=dtype, **{**SHAPES, "long": LONG}[shape])
    found = poisoned(device, ops.sampled_error, *moved(args, device))
    check(args, found, unit=2.0**-20 if dtype == torch.float32 else 2e-3)


def test_budgets_reach_the_host_behind_its_back(cuda: torch.device) -> None:
    budgets = [torch.full((), value, device=cuda) for value in (0.1, GIVEN_UP)]
    late_copy(budgets)  # pinned memory is there from now on
    with no_host_synchronisation(cuda):
        copy = late_copy(budgets)
    torch.cuda.synchronize(cuda)
    assert which_are_given_up(copy) == [1]
