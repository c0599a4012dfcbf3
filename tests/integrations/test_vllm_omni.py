"""The plug-in behind a dispatcher that does what vLLM-Omni's does, from the facts of its interface.

The host is not installed here. What it does with a plug-in: it is found by entry point; one object for every layer
calls it with keyword scalars; params are merged from the configuration, the state of the loop (tensors with a row for
every sample) and the call; derived geometry is dropped where it does not fit the sequence; a mask is refused unless the
plug-in says that it takes one.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from svg2_compile.integrations import vllm_omni
from tests.support import IDENTITY, SELECTION, assert_close

BATCH, FRAMES, PATCHES, HEADS, WIDTH = 2, 4, 60, 2, 16
TOKENS = FRAMES * PATCHES


class Dispatcher:
    """One layer of the host."""

    def __init__(self, params: dict[str, Any], scale: float = WIDTH**-0.5) -> None:
        (found,) = [ep for ep in importlib.metadata.entry_points(group="vllm_omni.sparse_attn") if ep.name == "svg2"]
        self.function = found.load()
        self.static, self.scale = params, scale

    def forward(
        self, qkv: tuple[torch.Tensor, ...], step: int | None, total: int = 4, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = qkv[0].shape[0]
        params = dict(self.static)
        if step is not None:
            params["denoise_step_idx"] = torch.full((rows,), step)
            params["total_denoise_steps"] = torch.full((rows,), total)
        params["latent_shape"] = torch.tensor([[FRAMES, 12, 20]] * rows)
        params["patch_size"] = torch.tensor([[1, 2, 2]] * rows)
        if qkv[0].shape[1] == TOKENS:
            params |= {"total_latent_frames": FRAMES, "patches_per_frame": PATCHES}
        if mask is not None:
            assert self.function.capabilities["supports_attention_mask"]
            params["attn_mask"] = mask
        return self.function(*qkv, params, is_causal=False, softmax_scale=self.scale)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr("svg2_compile.integrations.vllm_omni.plugin._states", {})


def _qkv(tokens: int = TOKENS, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, tokens, HEADS, WIDTH, generator=generator) for _ in range(3))


def _dense(qkv: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv)
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def test_equals_dense_attention_with_all_clusters_kept():
    qkv = _qkv()
    out = Dispatcher(IDENTITY, scale=0.2).forward(qkv, step=0)
    assert_close(out, _dense(qkv, scale=0.2))
    assert [run.graph for run in vllm_omni.report().runs] == ["sparse"]


def test_layers_steps_and_branches_are_told_apart():
    layers = [Dispatcher(dict(SELECTION)) for _ in range(3)]
    for step in range(3):
        for branch in range(2):
            for number, layer in enumerate(layers):
                layer.forward(_qkv(seed=10 * number + branch), step=step)
    runs = vllm_omni.report().runs
    assert len({run.site for run in runs}) == 3 and {run.context for run in runs} == {0, 1}
    assert [run.step for run in runs if not run.seeded] == [0] * 6
    assert {run.source for run in runs} == {"context"}


def test_dense_steps_are_those_of_the_host():
    layer = Dispatcher({**SELECTION, "dense_steps": 0.5})
    for step in range(4):
        layer.forward(_qkv(), step=step)
    assert [run.reason for run in vllm_omni.report().runs] == ["dense_steps", "dense_steps", "sparse", "sparse"]


def test_padding_of_the_host_is_attended_by_nobody():
    """Ulysses appends tokens, which a mask [B, N] excludes; the derived geometry is dropped then."""
    qkv = _qkv(TOKENS + 4)
    mask = torch.ones(BATCH, TOKENS + 4, dtype=torch.bool)
    mask[:, TOKENS:] = False
    out = Dispatcher({**IDENTITY, "video": "first"}).forward(qkv, step=0, mask=mask)
    assert_close(out[:, :TOKENS], _dense(qkv, attn_mask=mask[:, None, None])[:, :TOKENS])
    assert [run.graph for run in vllm_omni.report().runs] == ["sparse"]


@pytest.mark.parametrize(("video", "tokens"), [("first", [0, TOKENS]), ("last", [30, TOKENS]), ([10, 200], [10, 200])])
def test_text_beside_the_video(video, tokens):
    qkv = _qkv(TOKENS + 30)
    assert_close(Dispatcher({**IDENTITY, "video": video}).forward(qkv, step=0), _dense(qkv))
    (site,) = vllm_omni.report().sites
    assert (site.video_tokens, site.context_tokens) == (tokens[1], TOKENS + 30 - tokens[1])


def test_where_nobody_tells_the_video_it_stays_dense():
    qkv = _qkv(TOKENS + 30)
    assert torch.equal(Dispatcher(IDENTITY).forward(qkv, step=0), _dense(qkv, scale=WIDTH**-0.5))
    (site,) = vllm_omni.report().sites
    assert site.reason == "unknown_layout" and "'first' or 'last'" in site.detail


def test_without_a_step_it_stays_dense(caplog):
    Dispatcher({**SELECTION, "dense_steps": 1}).forward(_qkv(), step=None)
    assert [run.reason for run in vllm_omni.report().runs] == ["no_timestep"]
    assert "no input tells the timestep" in caplog.text


def test_the_context_of_the_host_is_asked_before_a_tensor_is_read(monkeypatch):
    class Context:
        denoise_step_idx, total_denoise_steps = 3, 4

    monkeypatch.setattr("svg2_compile.integrations.vllm_omni.plugin._context", Context)
    Dispatcher(dict(SELECTION)).forward(_qkv(), step=0)
    assert [run.step for run in vllm_omni.report().runs] == [3]


def test_mistakes_are_named(caplog):
    with pytest.raises(ValueError, match=r"density=2\.0 is not valid"):
        Dispatcher({"density": 2.0}).forward(_qkv(), step=0)
    with pytest.raises(ValueError, match=r"params\['video'\] is 'middle'"):
        Dispatcher({**IDENTITY, "video": "middle"}).forward(_qkv(), step=0)
    Dispatcher({**IDENTITY, "densty": 0.1}).forward(_qkv(), step=0)
    assert "params['densty'] is not known" in caplog.text
