"""Rules of the operators that cut, join and shift positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.passes.layout.named_axes import JOINT, VIDEO, layouts

CUTS = {
    "slice": (lambda x: x[:, 8:], JOINT, ("b:2", "text:4", "c:6")),
    "slice_from_end": (lambda x: x[:, :-4], JOINT, VIDEO),
    "slice_inside": (lambda x: x[:, 6:10], JOINT, ("b:2", "video:2|text:2", "c:6")),
    "slice_by_step": (lambda x: x[:, ::2], JOINT, ("b:2", "~text+video:6", "c:6")),
    "narrow": (lambda x: x.narrow(1, 0, 8), JOINT, VIDEO),
    "flip": (lambda x: x.flip(1), JOINT, ("b:2", "text:4|video:8", "c:6")),
    "roll": (lambda x: x.roll(1, 1), VIDEO, VIDEO),
    "roll_mixes": (lambda x: x.roll(1, 1), JOINT, ("b:2", "~text+video:12", "c:6")),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 3)), JOINT, ("b:2", "1|video:8|text:4|3", "c:6")),
    "pad_crops": (lambda x: F.pad(x, (0, 0, 0, -4)), JOINT, VIDEO),
    "pad_replicates": (lambda x: F.pad(x, (0, 0, 2, 0), mode="replicate"), VIDEO, ("b:2", "video:10", "c:6")),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name: str) -> None:
    function, spec, expected = CUTS[name]
    assert layouts(function, spec) == expected


def test_cat_and_split_keep_boundaries() -> None:
    text = ("b:2", "text:4", "c:6")
    assert layouts(lambda x, y: torch.cat([x, y], 1), VIDEO, text) == JOINT
    assert layouts(lambda x: x.split([8, 4], 1), JOINT) == [VIDEO, text]
    assert layouts(lambda x: x.chunk(3, 1), JOINT)[2] == text
    assert layouts(lambda x: torch.stack([x, x], 1), JOINT) == ("b:2", "2", "video:8|text:4", "c:6")
