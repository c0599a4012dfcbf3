"""Rules of the operators that look at the same positions in another way."""

from __future__ import annotations

import pytest
import torch

from tests.passes.layout.named_axes import JOINT, VIDEO, layouts

VIEWS = {
    "transpose": (lambda x: x.transpose(1, 2), JOINT, ("b:2", "c:6", "video:8|text:4")),
    "permute": (lambda x: x.permute(2, 0, 1), JOINT, ("c:6", "b:2", "video:8|text:4")),
    "t": (lambda x: x[0].t(), JOINT, ("c:6", "video:8|text:4")),
    "movedim": (lambda x: x.movedim(1, -1), JOINT, ("b:2", "c:6", "video:8|text:4")),
    "flatten": (lambda x: x.flatten(0, 1), JOINT, ("b:2 x video:8|text:4", "c:6")),
    "unflatten": (lambda x: x.flatten(0, 1).unflatten(0, (2, 12)), JOINT, JOINT),
    "heads": (lambda x: x.view(2, 12, 2, 3).transpose(1, 2), JOINT, ("b:2", "c:2", "video:8|text:4", "c:3")),
    "reshape_mixes": (lambda x: x.reshape(2, 3, 4, 6), JOINT, ("b:2", "video:2|text:1", "~text+video:4", "c:6")),
    "unsqueeze": (lambda x: x.unsqueeze(-1), JOINT, (*JOINT, "1")),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(0), JOINT, JOINT),
    "squeeze_all": (lambda x: x[:, None].squeeze(), JOINT, JOINT),
    "expand": (lambda x: x[:, None].expand(2, 5, 12, 6), JOINT, ("b:2", "5", "video:8|text:4", "c:6")),
    "repeat": (lambda x: x.repeat(3, 1, 1), JOINT, ("3 x b:2", "video:8|text:4", "c:6")),
    "select": (lambda x: x[:, 0], JOINT, ("b:2", "c:6")),
    "unfold": (lambda x: x.unfold(1, 2, 2), VIDEO, ("b:2", "video:4", "c:6", "video:2")),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (3, 2)))).flatten(2),
        JOINT,
        ("b:2", "video:8|text:4", "c:3 x 2"),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    function, spec, expected = VIEWS[name]
    assert layouts(function, spec) == expected


def test_unbind_keeps_the_other_axes() -> None:
    assert layouts(lambda x: x.unbind(0), JOINT) == [JOINT[1:], JOINT[1:]]
