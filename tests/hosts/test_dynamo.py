"""What Dynamo is taught lasts as long as a call, and what it is asked is answered truly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.functions import SkipFunctionVariable
from torch._dynamo.variables.tensor import TensorVariable

from svg2_compile.hosts.compiled_call import CompiledCall, OwnCode
from svg2_compile.hosts.dynamo import enabled_dynamo_settings, forgotten_frames, noted_breaks
from svg2_compile.logs.logger import Once, get_logger


def state() -> tuple[Any, ...]:
    config = torch._dynamo.config
    return (
        *(TensorVariable.__dict__["method_tolist"], SkipFunctionVariable.call_function),
        *(F.scaled_dot_product_attention, list(InstructionTranslator.dispatch_table)),
        *(config.recompile_limit, config.capture_dynamic_output_shape_ops, config.reorderable_logging_functions),
    )


def test_everything_is_put_back() -> None:
    before = state()

    def fail() -> None:
        with enabled_dynamo_settings():
            assert state()[0] is not before[0] and state()[2] is not before[2]
            with enabled_dynamo_settings():
                pass
            assert state()[0] is not before[0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert state() == before


def graphs_of(function: Any, *args: Any) -> tuple[Any, int]:
    count = 0

    def backend(gm: Any, examples: Any) -> Any:
        nonlocal count
        count += 1
        return gm

    with enabled_dynamo_settings(), torch.no_grad():
        result = torch.compile(function, backend=backend)(*args)
    return result, count


def reads(x: Tensor) -> Tensor:
    rows, columns = torch.tensor(x.shape).tolist()
    return x.reshape(columns, rows) * torch.tensor([rows]).max().item()


def branches(x: Tensor) -> Tensor:
    lengths = torch.tensor([x.shape[0], x.shape[0]])
    if lengths[0] == x.shape[0] and min(lengths) < 100:
        return x + 1
    return x - 1


def asks_for_packages(x: Tensor) -> Tensor:
    try:
        from no_such_attention import attend  # type: ignore[import-not-found]
    except ImportError as error:
        attend = len(str(error))
    try:
        from math import no_such_function  # type: ignore[attr-defined]
    except ImportError:
        no_such_function = 2
    import math

    return x * attend + no_such_function + math.pi


def data(x: Tensor) -> Tensor:
    return x + x.argmax().item()


@pytest.mark.parametrize(("function", "graphs"), [(reads, 1), (branches, 1), (asks_for_packages, 1), (data, 2)])
def test_known_numbers_do_not_break_a_graph(function: Any, graphs: int) -> None:
    torch._dynamo.reset()
    for count in (3, 5, 7):
        x = torch.randn(count, 4)
        result, _ = graphs_of(function, x)
        assert torch.equal(result, function(x))
    torch._dynamo.reset()
    assert graphs_of(function, torch.randn(3, 4))[1] == graphs


class Block(nn.Module):
    def forward(self, x: Tensor, grid: Tensor, *, size: Tensor | None = None) -> Tensor:
        rows, columns = grid.tolist()
        factor = 1 if size is None else size.item()
        return x[: rows * columns] * factor


def test_a_block_is_given_the_numbers_that_it_reads() -> None:
    graphs = []

    def backend(gm: Any, examples: Any) -> Any:
        graphs.append(gm)
        return gm

    module = Block()
    rest: dict[str, Any] = {"fullgraph": False, "dynamic": None, "forget": lambda: None}
    call = CompiledCall(module, backend, Once(get_logger()), OwnCode(), read_numbers=True, **rest)
    x = torch.randn(30)
    with torch.no_grad():
        for rows in (2, 3, 4):
            args, kwargs = (x, torch.tensor([rows, 5])), {"size": torch.tensor(rows)}
            assert torch.equal(call(*args, **kwargs), module(*args, **kwargs))
    assert len(graphs) <= 2 and not any(node.target == "item" for gm in graphs for node in gm.graph.nodes)


def test_breaks_have_a_line_and_a_way_out() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with noted_breaks() as breaks, forgotten_frames():
        torch.compile(broken, backend="eager")(torch.randn(3))
    ((place, reason),) = breaks.items()
    assert place.startswith(__file__) and "Way out: remove the call" in reason
