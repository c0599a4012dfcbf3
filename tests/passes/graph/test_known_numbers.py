"""Numbers in tensors that were made of Python numbers are known; what depends on data is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from svg2_compile.passes.graph.known_numbers import known_numbers, linear_numbers
from svg2_compile.passes.graph.values import fake_mode_of, node_value
from tests.passes.attention_graphs import dynamo_graph


def grid(x: Tensor) -> Tensor:
    return torch.stack([torch.tensor(x.shape, dtype=torch.long)])


def offsets(x: Tensor) -> Tensor:
    return torch.arange(0, 3, dtype=torch.int32) * x.shape[0]


def summed(x: Tensor) -> Tensor:
    lengths = torch.full((2,), x.shape[0], dtype=torch.int32)
    return torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)


def longest(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[1]], dtype=torch.long).max().view(1)


def assigned(x: Tensor) -> Tensor:
    starts = torch.zeros(3, dtype=torch.int32)
    starts[1] = x.shape[0]
    starts[2] = x.shape[0] + 2
    return starts


def halved(x: Tensor) -> Tensor:
    return (torch.tensor([7, 9]) // 2).repeat(2)[1:]


class Made(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x)


def output_of(make: Any, x: Tensor, dynamic: bool) -> tuple[fx.GraphModule, fx.Node]:
    gm, _ = dynamo_graph(Made(make), x, dynamic=dynamic)
    (node,) = gm.graph.output_node().all_input_nodes
    return gm, node


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [grid, offsets, summed, longest, assigned, halved])
@given(rows=st.integers(2, 6), columns=st.integers(3, 9))
@settings(max_examples=3, deadline=None)
def test_known_numbers_are_what_the_model_computes(make: Any, dynamic: bool, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, 5)
    gm, node = output_of(make, x, dynamic)
    shape_env = fake_mode_of(gm).shape_env
    hints = shape_env.backed_var_to_val if shape_env is not None else {}

    def total(terms: Any) -> Any:
        if isinstance(terms, list):
            return [total(term) for term in terms]
        values = {key: node_value(key) if key is not None else 1 for key in terms}
        sizes = {k: v.node.expr.xreplace(hints) if isinstance(v, torch.SymInt) else v for k, v in values.items()}
        return sum(int(sizes[key]) * count for key, count in terms.items())

    assert total(linear_numbers(node)) == make(x).tolist()


def written_late(x: Tensor) -> Tensor:
    starts = torch.zeros(3, dtype=torch.int32)
    used = starts + 1
    starts[1] = 5
    return used


def written_through_a_view(x: Tensor) -> Tensor:
    starts = torch.zeros(3, dtype=torch.int32)
    starts[1:].fill_(x.shape[0])
    return starts + 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x > 0).sum(-1)[0],
        lambda x: torch.zeros(2, dtype=torch.long).add_(3),
        lambda x: torch.arange(5000),
        lambda x: torch.tensor([2, 3]) * x.argmax(),
        written_late,
        written_through_a_view,
    ],
)
def test_what_depends_on_data_or_is_written_is_unknown(make: Any) -> None:
    _, node = output_of(make, torch.randn(4, 6, 5), dynamic=False)
    assert linear_numbers(node) is None and known_numbers(node) is None


def test_only_single_nodes_are_numbers() -> None:
    _, node = output_of(offsets, torch.randn(4, 6, 5), dynamic=True)
    assert linear_numbers(node) is not None and known_numbers(node) is None  # 2 * s0 is no node
    _, node = output_of(grid, torch.randn(4, 6, 5), dynamic=True)
    assert all(isinstance(number, fx.Node) for number in known_numbers(node)[0])
