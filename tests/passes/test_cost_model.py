"""The cost model: monotone, consistent with its own crossover, symbolic."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from svg2_compile.kernels.dispatch import DEFAULT_IMPLEMENTATION
from svg2_compile.passes.cost_model import (
    CostInputs,
    crossover_tokens,
    expected_density,
    sparse_seconds,
    speedup,
)
from svg2_compile.passes.device_profile import CPU, profile_for

COST = CostInputs(
    video=32768, context=0, groups=4, head_dim=128, num_q_clusters=131, num_k_clusters=436, iters=2, density=0.25
)


def test_speedup_grows_with_length_and_sparsity_towards_its_limit():
    lengths = [float(speedup(dataclasses.replace(COST, video=n), CPU)) for n in (1000, 4000, 16000, 64000)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    sparser = [float(speedup(dataclasses.replace(COST, density=d), CPU)) for d in (1.0, 0.5, 0.25, 0.125)]
    assert sparser == sorted(sparser) and sparser[0] < 1 < sparser[-1]
    assert lengths[-1] < CPU.sparse_flops / CPU.dense_flops / COST.density


def test_the_crossover_is_where_the_speedup_is_one():
    crossover = crossover_tokens(COST, CPU)
    assert crossover is not None
    assert speedup(dataclasses.replace(COST, video=crossover), CPU) > 1
    assert speedup(dataclasses.replace(COST, video=crossover - 1), CPU) <= 1


def test_compensation_and_routing_have_their_price():
    routing = {"compensation": True, "error_routing": True}
    plain, compensated, routed, first_order = (
        float(sparse_seconds(dataclasses.replace(COST, **extra), CPU))
        for extra in ({}, {"compensation": True}, routing, {**routing, "first_order": True})
    )
    assert plain < compensated < routed < first_order < 1.3 * plain


def test_nothing_is_gained_at_full_density():
    assert crossover_tokens(dataclasses.replace(COST, density=1.0), CPU) is None


def test_costs_are_expressions_over_token_counts():
    tokens = sympy.Symbol("s0", positive=True)
    seconds = sparse_seconds(dataclasses.replace(COST, video=tokens), CPU)
    assert seconds.free_symbols == {tokens}
    assert float(seconds.subs(tokens, 32768)) == pytest.approx(float(sparse_seconds(COST, CPU)))


@pytest.mark.parametrize(
    ("top_p", "density", "ratio", "expected"),
    [
        (0.9, None, 0.1, 0.30),
        (0.7, None, 0.1, 0.14),
        (1.0, None, 0.1, 1.0),
        (0.9, 0.2, 0.1, 0.2),
        (0.1, None, 0.4, 0.4),
    ],
)
def test_expected_density(top_p, density, ratio, expected):
    assert expected_density(top_p, density, ratio) == pytest.approx(expected)


def test_profiles_say_where_their_figures_come_from(monkeypatch):
    assert profile_for(torch.device("cpu")) is CPU
    monkeypatch.setitem(DEFAULT_IMPLEMENTATION, "cuda", "triton")
    assert profile_for(torch.device("cuda")).source
    # Where Triton is missing, CUDA tensors run the reference, and nothing is worth rewriting.
    monkeypatch.setitem(DEFAULT_IMPLEMENTATION, "cuda", "reference")
    assert "no fast kernels" in profile_for(torch.device("cuda")).source
