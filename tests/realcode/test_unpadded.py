"""Tokens that a mask picks: exact whatever it leaves, and the operator's own result where the starts are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import svg2_compile
from svg2_compile.codegen.inner_backend import inductor_problem
from svg2_compile.hosts.dynamo import enabled_dynamo_settings
from tests.realcode.models import streams_inputs
from tests.realcode.unpadded import PlacesModel, UnpaddedModel, places_inputs, unpadded_inputs, varlen
from tests.support import IDENTITY, SELECTION, assert_close

SIZE = (3, 8, 12)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def densities(enabled: Any) -> list[float]:
    return [run.density for run in enabled.report().runs if run.graph == "sparse"]


@pytest.mark.parametrize("valid", [(6,), (3,), (0, 6), (6, 6), (1, 5, 2)], ids=str)
def test_any_number_of_rows_and_of_valid_tokens_is_exact(valid: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module, reference = built(UnpaddedModel), built(UnpaddedModel)
    args, kwargs = unpadded_inputs(*SIZE, valid)
    with torch.no_grad(), svg2_compile.enable(module, **IDENTITY) as enabled:
        for actual, expected in zip(module(*args, **kwargs), reference(*args, **kwargs), strict=True):
            assert_close(actual, expected)
        (site, _) = enabled.report().sites
        assert (site.decision, site.video_tokens, site.context_tokens) == ("sparse", 72, 6)
        assert len(densities(enabled)) == 2


@pytest.mark.slow
@pytest.mark.skipif(inductor_problem("cpu") is not None, reason="Inductor cannot work here")
def test_inductor_reads_the_longest_at_a_second_size_as_well(caplog: pytest.LogCaptureFixture) -> None:
    """In one graph: it is handed the model whole, and does not refuse the read."""
    torch.manual_seed(1)
    module, reference = built(UnpaddedModel), built(UnpaddedModel)
    settings = {**IDENTITY, "inner_backend": "inductor"}
    # Without a cache: what was compiled once is not traced again, and cannot refuse.
    with fresh_cache(), torch.no_grad(), svg2_compile.enable(module, **settings) as enabled:
        for size in (SIZE, (2, 10, 12)):
            args, kwargs = unpadded_inputs(*size)
            for actual, expected in zip(module(*args, **kwargs), reference(*args, **kwargs), strict=True):
                assert_close(actual, expected)
        assert len(densities(enabled)) == 4 and "graph break" not in caplog.text


def test_sparse_where_the_places_are_those_of_the_starts() -> None:
    """With few clusters kept, less than all is computed: it is not the operator that yields the result."""
    torch.manual_seed(1)
    module = built(UnpaddedModel)
    args, kwargs = unpadded_inputs(*SIZE)
    with torch.no_grad(), svg2_compile.enable(module, **{**SELECTION, "top_p": 0.3}) as enabled:
        module(*args, **kwargs)
        assert [density < 0.9 for density in densities(enabled)] == [True, True], densities(enabled)


@pytest.mark.parametrize("kind", ["other starts", "other order"])
def test_other_starts_than_those_of_the_places_get_the_result_of_the_operator(kind: str) -> None:
    torch.manual_seed(1)
    module, reference = built(PlacesModel), built(PlacesModel)
    (video, timestep, text, places, starts, longest), rotary = places_inputs(*SIZE)
    if kind == "other starts":
        starts = torch.tensor([0, 10, int(starts[-1])], dtype=torch.int32)
        longest = int(starts[-1]) - 10
    if kind == "other order":
        places = places[torch.randperm(len(places))]
    args = (video, timestep, text, places, starts, longest)
    with torch.no_grad(), svg2_compile.enable(module, **IDENTITY) as enabled:
        assert_close(module(*args, **rotary), reference(*args, **rotary))
        assert densities(enabled) == [1.0, 1.0]


class PickedTwice(nn.Module):
    """Keys are not the tokens that queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 192)

    def forward(self, x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        tokens = self.qkv(x.flatten(2).transpose(1, 2)).flatten(0, 1).unflatten(-1, (3, 2, 32))
        query, key, value = tokens.unbind(1)
        places, others = (torch.nonzero(m.flatten()).flatten() for m in (mask, other))
        starts = nn.functional.pad(mask.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        out = varlen(query[places], key[others], value[others], starts, x.shape[-1])
        back = torch.zeros_like(query)
        back[places] = out
        return back.unflatten(0, (x.shape[0], -1)).flatten(2)


def test_other_keys_than_queries_are_dense_with_the_reason() -> None:
    module = built(PickedTwice)
    (video, *_), _ = streams_inputs(2, 4, 8)
    video, mask = torch.cat([video, video]), torch.arange(64) < torch.tensor([60, 50])[:, None]
    with torch.no_grad(), svg2_compile.enable(module, **IDENTITY) as enabled:
        expected = module.forward(video, mask, mask.flip(1))
        assert_close(module(video, mask, mask.flip(1)), expected)
        (site,) = enabled.report().sites
    assert (site.decision, site.reason) == ("dense", "picked_tokens")
    assert "mask over keys" in site.detail
    assert "picked_tokens" in str(svg2_compile.explain(module, video, mask, mask.flip(1)))


def test_only_how_long_the_longest_is_becomes_a_number_of_the_graph() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    def of_a_mask(mask: Tensor, _: Tensor) -> Any:
        return mask.sum(-1).max().item() + 1

    def of_numbers(_: Tensor, numbers: Tensor) -> Any:
        return numbers.max().item() + 1

    args = (torch.ones(2, 5, dtype=torch.bool), torch.tensor([3, 4]))
    for function, breaks in ((of_a_mask, 0), (of_numbers, 1)):
        with enabled_dynamo_settings() as lesson:
            assert torch.compile(function, backend=backend)(*args) == function(*args)
            assert len(lesson.breaks) == breaks
