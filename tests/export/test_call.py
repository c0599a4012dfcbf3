"""How a program is called: structures, names, constants, dynamic sizes, and an error for all that does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import svg2_compile
from svg2_compile import ExportError
from svg2_compile.export.conditions import read_conditions
from tests.export.programs import Attention, block, block_inputs, exported_block
from tests.support import IDENTITY, SELECTION, assert_close

TOKENS = Dim("tokens", min=16, max=4096)


class NamedLikeWeights(Attention):
    """torch.export puts p_, b_ and c_ in front of weights; these are inputs."""

    def forward(self, p_video: Tensor, b_time: Tensor) -> Tensor:
        return self.attend(p_video, b_time)


class Structured(Attention):
    def forward(self, video: Tensor, extra: dict[str, Any], *, scale: float = 2.0, flag: Any = None) -> dict[str, Any]:
        out = self.attend(video, extra["time"]) * extra["shifts"][0] * scale
        return {"out": out, "nothing": None, "list": [video, 3]}


class Counting(Attention):
    """Changes a buffer and one of its inputs in place."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        self.calls.add_(1)
        out = self.attend(video, time) + self.calls
        time.sub_(1.0)
        return out


class WithNumber(Attention):
    def forward(self, video: Tensor, time: Tensor, number: int) -> Tensor:
        return self.attend(video, time) * number


class UnderNoGrad(Attention):
    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():
            return self.attend(video, time)


class UnderAutocast(Attention):
    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.attend(video, time)


def check(
    module: nn.Module, *calls: tuple[Any, ...], slack: float = 1.0, **export: Any
) -> svg2_compile.TransformedProgram:
    """Export with the first call, transform, and compare every call with the module."""
    reference = copy.deepcopy(module)
    program = svg2_compile.transform(torch.export.export(module, copy.deepcopy(calls[0]), **export), **IDENTITY)
    assert len(program.sparse_sites) == 1 and program.time.kind == "timestep"
    for call in calls:
        given, wanted = copy.deepcopy(call), copy.deepcopy(call)
        with torch.no_grad():
            pairs = (program(*given), reference(*wanted)), (given, wanted)
        for mine, theirs in pairs:
            leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (mine, theirs)]
            for one, two in zip(*leaves, strict=True):
                assert_close(one, two, slack) if isinstance(two, Tensor) else _same(one, two)
    assert {run.graph for run in program.report().runs} == {"sparse"}
    return program


def _same(one: Any, two: Any) -> None:
    assert one == two


def test_names_like_those_of_weights():
    check(block(NamedLikeWeights), block_inputs())


def test_nested_inputs_and_outputs():
    video, time = block_inputs()
    extra = {"time": time, "shifts": (torch.tensor(2.0), torch.ones(3))}
    program = check(block(Structured), (video, extra))
    assert program.time.inputs == ("extra['time']",)
    # Another order of a dict's keys is the same structure.
    again = program(video, {"shifts": extra["shifts"], "time": time})
    assert set(again) == {"out", "nothing", "list"}
    with pytest.raises(ExportError, match=r"extra: has the structure dict\['time'\]"):
        program(video, {"time": time})


def test_mutations_happen_in_both_graphs():
    module = block(Counting)
    program = svg2_compile.transform(
        torch.export.export(copy.deepcopy(module), block_inputs()), **{**IDENTITY, "dense_steps": 1}
    )
    mine, theirs = (block_inputs()[1].clone() for _ in range(2))
    video = block_inputs()[0]
    for _ in range(3):  # the first step is dense
        with torch.no_grad():
            assert_close(program(video, mine), module(video, theirs))
    assert torch.equal(mine, theirs) and program.dense.state_dict["calls"].item() == 3.0
    assert [run.graph for run in program.report().runs] == ["dense", "sparse", "sparse"]


def test_a_number_that_may_change():
    video, time = block_inputs()
    shapes = {"video": None, "time": None, "number": Dim.DYNAMIC}
    program = check(block(WithNumber), (video, time, 3), (video, time, 5), dynamic_shapes=shapes)
    with pytest.raises(ExportError, match="number='3' is no number"):
        program(video, time, "3")


def test_dynamic_tokens_and_batch():
    batch = Dim("batch", min=1, max=8)
    shapes = ({0: batch, 1: TOKENS}, {0: batch})
    calls = [block_inputs(tokens, size) for tokens, size in ((96, 2), (133, 3), (40, 1))]
    program = check(block(), *calls, dynamic_shapes=shapes)
    with pytest.raises(ExportError, match=r"video: shape\[1\] is 8\. Valid: 16 to 4096"):
        program(*block_inputs(8))
    with pytest.raises(ExportError, match=r"time: shape\[0\] is 2\. Valid: 3, which is"):
        program(block_inputs(batch=3)[0], block_inputs(batch=2)[1])


def test_a_size_derived_from_another():
    """2 * tokens: no value of the graph has the size of the symbol itself."""
    program = check(block(), block_inputs(96), block_inputs(128), dynamic_shapes=({1: 2 * TOKENS}, None))
    with pytest.raises(ExportError, match=r"video: shape\[1\] is 97\. Valid: 96"):
        program(*block_inputs(97))
    with pytest.raises(ExportError, match=r"shape\[1\] is 8\. Valid: 32 to 8192"):
        program(*block_inputs(8))


@pytest.mark.parametrize("kind", [UnderNoGrad, UnderAutocast])
def test_attention_in_a_region_of_its_own(kind):
    # Under autocast the attention computes in bfloat16.
    check(block(kind), block_inputs(), slack=500 if kind is UnderAutocast else 1)


def test_positional_and_named_arguments():
    program = svg2_compile.transform(exported_block(), **SELECTION)
    video, time = block_inputs()
    expected = program(video, time)
    for call in (lambda: program(video, time=time), lambda: program(time=time, video=video)):
        program.reset()
        assert torch.equal(call(), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, t: ((v,), {}), "time: missing. Valid: every one of video, time"),
        (lambda v, t: ((v, t, t), {}), "args: 3 given, exported with 2 by position"),
        (lambda v, t: ((v, t), {"time": t}), "time: given by position and by name"),
        (lambda v, t: ((v, t), {"text": t}), "text: the program was exported without this argument"),
        (lambda v, t: ((v, 9.0), {}), "time: float given. Valid: a tensor"),
        (lambda v, t: ((v.double(), t), {}), r"video: a tensor \[1, 96, 32\] of float64 .* Valid: .* float32"),
        (lambda v, t: ((v[0], t), {}), r"video: a tensor \[96, 32\] .* given. Valid: a tensor \[1, 96, 32\]"),
        (lambda v, t: ((v[:, :40], t), {}), r"video: shape\[1\] is 40. Valid: 96 \(fixed at export\)"),
        (lambda v, t: ((v.to("meta"), t), {}), "video: .* on meta given. Valid: .* on cpu"),
        (lambda v, t: ((v.requires_grad_(), t), {}), "video: requires a gradient"),
        (lambda v, t: (([v], t), {}), r"video: has the structure list\(\*\). Valid: \*"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    program = svg2_compile.transform(exported_block(), **SELECTION)
    args, kwargs = call(*block_inputs())
    with pytest.raises(ExportError, match=message):
        program(*args, **kwargs)


def test_a_constant_cannot_change():
    video, time = block_inputs()
    program = svg2_compile.transform(torch.export.export(block(WithNumber), (video, time, 3)), **SELECTION)
    assert torch.equal(program(video, time, 3), program.dense.module()(video, time, 3)) is False  # it is sparse
    program(video, time)  # a constant may be left out
    with pytest.raises(ExportError, match=r"number=4: the value was fixed at export\. Valid: 3"):
        program(video, time, 4)


def test_conditions_beyond_ranges():
    paths = ["['video']", "['extra'][0]"]
    sources = [
        "L['video'].size()[1] % 2 == 0",
        "(L['flat_args'][1].size()[0] // 2) != 1",
        "max(L['extra'][0].size()[0], 3) <= L['video'].size()[1]",
        "__import__('os').system('true') == 0",
        "L['video'].data_ptr() > 0",
        "not python at all (",
    ]
    even, not_one, fits = read_conditions(sources, paths)
    video = torch.zeros(1, 6)
    assert even.holds([video, torch.zeros(5)]) and not even.holds([torch.zeros(1, 5), torch.zeros(5)])
    assert not not_one.holds([video, torch.zeros(2)]) and fits.holds([video, torch.zeros(5)])
    assert even.text == "video.size()[1] % 2 == 0" and "extra[0].size()" in not_one.text


def test_conditions_of_a_program_are_checked():
    class Halves(Attention):
        def forward(self, video: Tensor, time: Tensor) -> Tensor:
            if video.shape[1] % 2 == 0:
                return self.attend(video, time)
            return video

    program = svg2_compile.transform(
        torch.export.export(block(Halves), block_inputs(), dynamic_shapes=({1: Dim.AUTO}, None)), **IDENTITY
    )
    program(*block_inputs(98))
    with pytest.raises(ExportError, match=r"assumption that|Valid"):
        program(*block_inputs(97))
