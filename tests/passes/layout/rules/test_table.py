"""Every operator finds its rule, or is counted as one without."""

from __future__ import annotations

import torch

from svg2_compile.passes.layout.rules.table import RULES, rule_for
from tests.passes.layout.named_axes import VIDEO, analyse, spelled


def test_an_operator_without_a_rule_is_unknown_and_counted() -> None:
    result, mode = analyse(lambda x: torch.linalg.qr(x)[0], VIDEO)
    assert dict(mode.unruled_ops) == {"aten.linalg_qr.default": 1}
    assert spelled(mode.axes_of(result)) == ("?", "?", "?")


def test_in_place_operators_share_the_rule_of_their_twin() -> None:
    assert rule_for(torch.ops.aten.masked_fill_.Scalar) is rule_for(torch.ops.aten.masked_fill.Scalar)
    assert rule_for(torch.ops.aten.index_put_.default) is rule_for(torch.ops.aten.index_put.default)
    assert rule_for(torch.ops.aten.linalg_qr.default) is None


def test_every_rule_names_an_operator_of_this_torch() -> None:
    missing = [packet for packet in RULES if not packet.overloads()]
    assert missing == []
