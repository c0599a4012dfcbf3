"""Code in the manner of what people run: sparse at every size, whole and by blocks, exact with all clusters kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import svg2_compile
from tests.realcode import models, packed, unpadded
from tests.realcode.models import Sample
from tests.support import IDENTITY, assert_close

MODELS = {**models.MODELS, **packed.PACKED, **unpadded.UNPADDED}
SIZES = [(3, 8, 12), (2, 12, 8), (4, 6, 10)]


def built(sample: Sample) -> nn.Module:
    torch.manual_seed(0)
    return sample.build().eval()


def results(module: Any, sample: Sample, size: tuple[int, int, int]) -> list[Tensor]:
    torch.manual_seed(1)
    args, kwargs = sample.inputs(*size)
    return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


def sparse_runs(report: svg2_compile.Report) -> int:
    return sum(run.graph == "sparse" for run in report.runs)


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_enabled_models_are_sparse_at_every_size(name: str, regional: bool) -> None:
    sample = MODELS[name]
    module, reference = built(sample), built(sample)
    with torch.no_grad(), svg2_compile.enable(module, regional=regional, **IDENTITY) as enabled:
        for count, size in enumerate(SIZES, 1):
            assert_same(results(module, sample, size), results(reference, sample, size))
            assert sparse_runs(enabled.report()) == count * sample.sparse
        assert {site.reason for site in enabled.report().sites} <= {"sparse", "cross_attention"}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lists and a grid tensor"])
def test_plain_compile_is_sparse_at_every_size(name: str) -> None:
    sample = MODELS[name]
    module = built(sample)
    compiled = torch.compile(module, backend="svg2", fullgraph=True, options=IDENTITY)
    with torch.no_grad():
        for count, size in enumerate(SIZES, 1):
            assert_same(results(compiled, sample, size), results(module, sample, size))
            assert sparse_runs(svg2_compile.report(module)) == count * sample.sparse


@pytest.mark.parametrize("name", [name for name, sample in MODELS.items() if sample.exports])
def test_exported_models_are_sparse(name: str) -> None:
    sample = MODELS[name]
    module = built(sample)
    torch.manual_seed(1)
    args, kwargs = sample.inputs(*SIZES[0])
    with torch.no_grad():
        program = svg2_compile.transform(torch.export.export(module, args, kwargs), **IDENTITY)
        assert_same([program(*args, **kwargs)], results(module, sample, SIZES[0]))
    assert sparse_runs(svg2_compile.report(program)) == sample.sparse


def test_text_is_never_clustered() -> None:
    sample = MODELS["double and single streams"]
    for regional in (False, True):
        torch._dynamo.reset()
        module = built(sample)
        with torch.no_grad(), svg2_compile.enable(module, regional=regional, **IDENTITY) as enabled:
            results(module, sample, SIZES[0])
            sites = enabled.report().sites
        assert {(site.video_tokens, site.context_tokens) for site in sites} == {(72, 6)}
