"""The error that is measured on a few rows: what it says, and the CPU's against the oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch

from svg2_compile.kernels import ops
from svg2_compile.kernels.cpu import implementation as cpu
from svg2_compile.kernels.reference import implementation as reference
from svg2_compile.kernels.sampling import sampled_tokens
from tests.kernels.sampled_error_cases import SHAPES, arguments, check, oracle


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_the_cpu_is_the_oracle(shape: str, rows: int) -> None:
    args = arguments(rows, **SHAPES[shape])
    check(args, cpu.sampled_error(*args))
    check(args, reference.sampled_error(*args))


def test_low_precision() -> None:
    args = arguments(noise=0.1, dtype=torch.bfloat16)
    check(args, cpu.sampled_error(*args))


def test_every_row_gives_the_error_of_the_whole_result() -> None:
    """Where all clustered rows are taken it is ||out - exact|| / ||exact||, head by head and of all."""
    args = arguments(rows=130, q_heads=3, kv_heads=3)
    for offsets in args[5:6]:
        offsets[..., 1:] = 130  # one cluster, nothing beside it
    query, key, value, out, _, _, k_offsets, scale, _ = args
    wrong, size = [], []
    for h in range(3):
        end = int(k_offsets[0, h, -2])
        exact = torch.nn.functional.scaled_dot_product_attention(
            query[:, h], key[:, h, :end], value[:, h, :end], scale=scale
        )
        wrong.append((out[:, h] - exact).square().sum())
        size.append(exact.square().sum())
    errors, error = cpu.sampled_error(*args)
    torch.testing.assert_close(errors[0], torch.stack([(w / s).sqrt() for w, s in zip(wrong, size, strict=True)]))
    torch.testing.assert_close(error, (torch.stack(wrong).sum() / torch.stack(size).sum()).sqrt())
    assert 0.02 < float(error) < 0.04  # the noise is 0.03


def test_exact_results_have_no_error_and_a_nan_shows() -> None:
    args = list(arguments(noise=0.0))
    assert float(cpu.sampled_error(*args)[1]) < 1e-6
    args[3] = args[3].clone()
    args[3][0, 1] = math.nan
    errors, error = cpu.sampled_error(*args)
    assert errors.isnan().tolist() == [[False, True]] and error.isnan()


def test_rows_lie_evenly_over_the_clusters_and_differ_between_heads() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).to(torch.int32).expand(1, 2, 1000)
    offsets = torch.tensor([0, 300, 800, 900, 1000], dtype=torch.int32).expand(1, 2, 5)  # 800 in two clusters
    tokens = sampled_tokens(order, offsets, 16)
    positions = torch.argsort(order.long(), dim=-1).gather(2, tokens)
    assert positions.diff(dim=-1).eq(50).all() and positions.max() < 800
    assert set(positions[0, 0].tolist()).isdisjoint(positions[0, 1].tolist())
    assert int((positions < 300).sum(dim=-1).max()) == 6


def test_masked_keys_and_queries_play_no_part() -> None:
    args = list(arguments())
    expected = oracle(tuple(args))
    end = args[6][0, :, -2]
    key, value = args[1].clone(), args[2].clone()
    for h in range(2):
        key[0, h, int(end[h]) :] = 1e3
        value[0, h, int(end[h]) :] = math.nan
    found = cpu.sampled_error(args[0], key, value, *args[3:])
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "bad", "message"),
    [
        (8, 0, "rows is 0; valid: an integer of at least 1"),
        (3, torch.zeros(1, 2, 130, 15), r"out has shape \[1, 2, 130, 15\]"),
        (4, torch.zeros(1, 2, 129, dtype=torch.int32), r"q_order has shape \[1, 2, 129\]"),
        (7, math.inf, "scale is inf"),
    ],
)
def test_contract(place: int, bad: object, message: str) -> None:
    args = list(arguments())
    args[place] = bad
    with pytest.raises(ValueError, match=f"svg2::sampled_error: {message}"):
        ops.sampled_error(*args)
