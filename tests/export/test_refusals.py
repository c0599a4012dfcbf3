"""Programs that transform cannot use: each is refused with its reason."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import svg2_compile
from svg2_compile import ExportError
from svg2_compile.settings.config import ConfigError
from tests.export.programs import Attention, Block, block, block_inputs, exported_block
from tests.support import IDENTITY, SELECTION
from tests.zoo.models import build


class WithDropout(Attention):
    def __init__(self, probability: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(probability)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        return self.dropout(self.attend(video, time))


class AttentionDropout(Attention):
    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        query = (video * time).unflatten(2, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.1)


class WithBatchNorm(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        return self.norm(self.attend(video, time).transpose(1, 2))


class InCondition(Attention):
    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        return torch.cond(time.sum() > 0, self.attend, lambda video, time: video + time[:, None, None], (video, time))


def test_what_is_no_exported_program():
    for wrong in (block(), exported_block().module(), "model.pt2", None):
        with pytest.raises(
            TypeError, match=r"expected a torch\.export\.ExportedProgram, got .* torch\.export\.export\(model"
        ):
            svg2_compile.transform(wrong)
    with pytest.raises(ConfigError, match="Did you mean 'top_p'"):
        svg2_compile.transform(exported_block(), top_pp=1)


def test_no_attention():
    program = torch.export.export(nn.Linear(4, 4).eval(), (torch.zeros(1, 4),))
    with pytest.raises(ExportError, match=r"no attention among its . operations"):
        svg2_compile.transform(program)


def test_attention_out_of_reach(caplog):
    program = torch.export.export(block(InCondition), block_inputs())
    with pytest.raises(ExportError, match="at the top level of its graph"):
        svg2_compile.transform(program, **IDENTITY)
    assert "attention inside of cond stays dense" in caplog.text


@pytest.mark.parametrize("kind", [WithDropout, WithBatchNorm])
def test_training_mode(kind):
    program = torch.export.export(block(kind).train(), block_inputs())
    with pytest.raises(ExportError, match=r"is in training mode. Valid: a program exported after model\.eval\(\)"):
        svg2_compile.transform(program, **IDENTITY)
    svg2_compile.transform(torch.export.export(block(kind), block_inputs()), **IDENTITY)


def test_attention_with_dropout():
    program = torch.export.export(block(AttentionDropout), block_inputs())
    with pytest.raises(ExportError, match=r"scaled_dot_product_attention.* is in training mode"):
        svg2_compile.transform(program, **IDENTITY)


def test_dropout_that_drops_nothing_is_no_training():
    module = WithDropout(probability=0.0).train()
    assert svg2_compile.transform(torch.export.export(module, block_inputs()), **IDENTITY).sparse is not None


def test_a_program_that_computes_gradients():
    class Loss(Block):
        def forward(self, video: Tensor, time: Tensor) -> Tensor:
            return super().forward(video, time).sum()

    from torch.export.experimental import _export_forward_backward

    program = _export_forward_backward(torch.export.export(block(Loss), block_inputs()))
    with pytest.raises(ExportError, match="computes gradients"):
        svg2_compile.transform(program, **IDENTITY)


def test_a_rewritten_graph_is_not_rewritten_again():
    sparse = svg2_compile.transform(exported_block(), **SELECTION).sparse
    with pytest.raises(ExportError, match=r"has svg2\.kmeans\.default already"):
        svg2_compile.transform(sparse)


def test_weights_without_values():
    with FakeTensorMode():
        program = torch.export.export(Block().eval(), (torch.zeros(1, 96, 32), torch.zeros(1)))
    with pytest.raises(ExportError, match=r"qkv\.weight has no values"):
        svg2_compile.transform(program, **IDENTITY)


def test_a_constant_that_torch_export_lost():
    """CogVideoX builds its position embedding in forward, and torch.export keeps a tensor without values of it."""
    module, inputs = build("cogvideox")
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, strict=True)
    with pytest.raises(ExportError, match=r"patch_embed.* has no values: torch.export lost them"):
        svg2_compile.transform(program, **IDENTITY)


def test_a_state_of_the_wrong_shape():
    """The rewritten program called by itself, with centroids of another size."""
    program = svg2_compile.transform(exported_block(), **SELECTION)
    states = [torch.zeros([int(extent) for extent in slot.shape]) for slot in program.spec.slots]
    run = program.sparse.module()
    inputs = block_inputs()
    assert len(run(*inputs, *states, torch.tensor(False), 3)) == 1 + len(states) + len(program.spec.density_sites)
    states[0] = torch.zeros(1, 2, 6, 16)
    with pytest.raises((AssertionError, RuntimeError), match=r"shape\[2\] to be equal to 5, but got 6"):
        run(*inputs, *states, torch.tensor(False), 3)


def test_nothing_sparse_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        program = svg2_compile.transform(exported_block(), min_tokens=10**6)
    assert "0 of 1 attentions sparse" in caplog.text and "short_sequence" in caplog.text
    video, time = block_inputs()
    assert torch.equal(program(video, time), exported_block().module()(video, time))
    assert program.report().sparse_sites == []


def test_what_cannot_be_saved(tmp_path):
    class Subclass(torch.Tensor):
        pass

    program = svg2_compile.transform(exported_block(), **SELECTION)
    state = dict(program.dense.state_dict)
    program.dense.state_dict["qkv.bias"] = state["qkv.bias"].data.as_subclass(Subclass)
    try:
        with pytest.raises(ExportError, match=r"qkv\.bias is a Subclass. Valid: plain tensors"):
            svg2_compile.save(program, tmp_path / "x.pt2")
    finally:
        program.dense.state_dict.update(state)
    assert list(tmp_path.iterdir()) == []
