"""The measured error in Triton against the oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

from svg2_compile.kernels.triton import implementation
from tests.kernels.sampled_error_cases import SHAPES, arguments, check


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_shapes_and_numbers_of_rows(shape: str, rows: int) -> None:
    args = arguments(rows, **SHAPES[shape])
    check(args, implementation.sampled_error(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    args = arguments(noise=0.1, dtype=dtype)
    check(args, implementation.sampled_error(*args), unit=2e-3)


def test_keys_far_apart_in_stretches_of_their_own() -> None:
    args = list(arguments(num_keys=700))
    args[1] = args[1] * torch.linspace(-40, 40, 700)[:, None]
    check(tuple(args), implementation.sampled_error(*args), unit=1e-4)


def test_a_nan_shows() -> None:
    args = list(arguments())
    args[3] = args[3].clone()
    args[3][0, 1] = math.nan
    errors, error = implementation.sampled_error(*args)
    assert errors.isnan().tolist() == [[False, True]] and error.isnan()
