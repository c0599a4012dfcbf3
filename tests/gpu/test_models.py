"""A diffusers transformer through every door of the compiler on a CUDA device, over several denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import svg2_compile
from tests.support import IDENTITY, SELECTION, at_timestep, first_output
from tests.zoo.models import build

TIMESTEPS = (900, 900, 700, 700, 400)  # two guidance branches, three steps
# Of the largest value: kernels sum in other orders, and a few layers multiply that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
INDUCTOR: dict[str, Any] = {"inner_backend": "inductor", "strict": True}


@pytest.fixture(params=["wan_t2v", "hunyuan_video", "ltx_video"])
def model(request: pytest.FixtureRequest, cuda: torch.device) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    module, given = build(request.param)
    yield module.to(cuda), on(cuda, given)
    torch._dynamo.reset()


def on(device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def steps(call: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """The results of a short denoising loop; a CUDA graph's are copied before the next call overwrites them."""
    results = []
    with torch.no_grad():
        for timestep in TIMESTEPS:
            torch.compiler.cudagraph_mark_step_begin()
            results.append(first_output(call, at_timestep(given, timestep)).clone())
    return results


def assert_alike(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).abs().max()) <= TOLERANCE[e.dtype] * float(e.abs().max())


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_backend_with_all_kept_equals_eager(model: tuple[nn.Module, dict[str, Any]], mode: str | None) -> None:
    module, given = model
    expected = steps(module, given)
    options: dict[str, Any] = {**IDENTITY, **INDUCTOR, "inductor_mode": mode}
    compiled = torch.compile(module, backend="svg2", fullgraph=True, options=options)
    assert_alike(steps(compiled, given), expected)
    runs = svg2_compile.report(module).runs
    assert {run.graph for run in runs} == {"sparse"}
    assert [run.seeded for run in runs if run.layer == 0].count(True) > 0  # later steps continued from the centroids


@pytest.mark.parametrize("regional", [False, True])
def test_enable_with_all_kept_equals_eager(model: tuple[nn.Module, dict[str, Any]], regional: bool) -> None:
    module, given = model
    expected = steps(module, given)
    with svg2_compile.enable(module, regional=regional, **{**IDENTITY, **INDUCTOR}) as enabled:
        assert_alike(steps(module, given), expected)
        assert {run.graph for run in enabled.report().runs} == {"sparse"}
    assert_alike(steps(module, given), expected)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_selection_gives_the_same_with_and_without_inductor(
    model: tuple[nn.Module, dict[str, Any]], mode: str | None
) -> None:
    """With a real selection, and compensation: what runs inside CUDA graphs against the operators one by one."""
    module, given = model
    settings = {**SELECTION, "compensation": "centroid", "routing": "error", "top_p": 0.9}
    plain = steps(torch.compile(module, backend="svg2", options=settings), given)
    torch._dynamo.reset()
    options = {**settings, **INDUCTOR, "inductor_mode": mode}
    compiled = steps(torch.compile(module, backend="svg2", options=options), given)
    for a, e in zip(compiled, plain, strict=True):
        # A token on the edge of two clusters may change sides after another rounding: most of the result is compared.
        close = (a - e).abs() <= 1e-2 * e.abs().max()
        assert float(close.float().mean()) > 0.98


def test_dense_steps_come_first_and_sparse_ones_follow(cuda: torch.device) -> None:
    module, given = build("wan_t2v")
    module, given = module.to(cuda), on(cuda, given)
    expected = steps(module, given)
    options = {**SELECTION, **INDUCTOR, "dense_steps": 1}
    actual = steps(torch.compile(module, backend="svg2", options=options), given)
    assert_alike(actual[:2], expected[:2])
    assert not torch.equal(actual[-1], expected[-1]) and bool(actual[-1].isfinite().all())
    graphs = [run.graph for run in svg2_compile.report(module).runs if run.layer == 0]
    assert graphs[0] == "dense" and graphs[-1] == "sparse"


def test_bfloat16_model(cuda: torch.device) -> None:
    module, given = build("wan_t2v")
    module = module.to(cuda, torch.bfloat16)
    given = {name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    given = on(cuda, given)
    expected = steps(module, given)
    options: dict[str, Any] = {**IDENTITY, **INDUCTOR}
    assert_alike(steps(torch.compile(module, backend="svg2", options=options), given), expected)
