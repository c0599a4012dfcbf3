"""The part of a tensor that a rank takes: whichever it is, all ranks read the same of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from svg2_compile.passes.token_layout import analyse_token_layout
from tests.passes.layout.named_axes import spelled
from tests.passes.layout.rules.test_collective import gather, to_heads

RANKS = 2


@pytest.fixture(params=range(RANKS))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A group of ranks of which this process is one; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


def _layout(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """The axes of what ``function`` returns, in Dynamo's graph of it."""
    found: list[Any] = []

    def read(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        outputs: Any = gm.graph.output_node().args[0]
        (output,) = outputs
        found.append(spelled(analyse_token_layout(gm).axes[output]))
        return gm

    with torch.no_grad():
        torch.compile(function, backend=read, fullgraph=True, dynamic=False)(*inputs)
    return found[0]


VIDEO, TEXT = torch.randn(1, 24, 4, 6), torch.randn(1, 8, 4, 6)


def test_shards_of_video_and_of_text_are_joint_on_all_ranks(rank):
    def joint(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return to_heads(torch.cat([video.chunk(RANKS, 1)[rank], text.chunk(RANKS, 1)[rank]], 1))

    tokens = _layout(joint, VIDEO, TEXT)[1]
    assert tokens == "2 x l_video_:12|l_text_:4"


def test_shards_of_a_joint_sequence_are_that_sequence_again(rank):
    """24 of video and 8 of text on two ranks: the first has video alone, and may not take the second's for video."""

    def whole(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([video, text], 1)
        return to_heads(tokens.chunk(RANKS, 1)[rank])

    assert _layout(whole, VIDEO, TEXT)[1] == "?"
    assert _layout(whole, VIDEO[:, :16], TEXT.repeat(1, 2, 1, 1))[1] == "l_video_:16|l_text_:16"


def test_other_splits_keep_what_each_part_is(rank):
    def parts(video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        first, second = torch.cat([video, text], 1).chunk(RANKS, 1)
        return gather(first, 0) + gather(second, 0).sum()

    assert _layout(parts, VIDEO[:, :16], TEXT.repeat(1, 2, 1, 1))[1] == "l_video_:16"
