"""What changes a model beside us: LoRA adapters, quantised weights, guiders, a step of its own for every frame."""

from __future__ import annotations

import collections
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import svg2_compile
from tests.e2e.pipelines import BRANCHES, EXACT, LAYERS, STEPS, SmallPipeline, build
from tests.support import assert_close

BOTH = pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])


def _sparse(enabled: Any) -> list[Any]:
    return [run for run in enabled.report().runs if run.graph == "sparse"]


def _assert_each_is_cold_once(sparse: list[Any]) -> None:
    """Each layer and branch continues from its own centroids."""
    cold = collections.Counter((run.site, run.branch, run.video) for run in sparse if not run.seeded)
    assert set(cold.values()) == {1}


@BOTH
def test_lora_adapters_are_loaded_switched_and_weighted_while_enabled(regional):
    small, reference = build("wan"), build("wan")
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        small.run()
        for name in ("first", "second"):
            for pipeline in (small, reference):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(len(name))
                    pipeline.pipe.transformer.add_adapter(lora, adapter_name=name)
        for adapters, weights in ((["first"], [1.0]), (["second"], [1.0]), (["first", "second"], [0.7, 0.3])):
            for pipeline in (small, reference):
                pipeline.pipe.transformer.set_adapters(adapters, weights)
            before = len(_sparse(enabled))
            assert_close(small.run(), reference.run(), slack=50)
            assert len(_sparse(enabled)) - before == BRANCHES * (STEPS - 1) * (LAYERS - 1)
        _assert_each_is_cold_once(_sparse(enabled))


@BOTH
def test_a_lora_is_hot_swapped(regional):
    """Its weights are exchanged in place: same parameters, same layers."""
    small = build("wan")
    transformer = small.pipe.transformer
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "only")
    other = {
        name: torch.randn_like(value)
        for name, value in peft.get_peft_model_state_dict(transformer, adapter_name="only").items()
    }
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        first = small.run()
        peft.set_peft_model_state_dict(transformer, other, adapter_name="only")
        second = small.run()
        graphs = len(enabled.report().graphs)
        _assert_each_is_cold_once(_sparse(enabled))
    assert not torch.allclose(first, second)
    assert_close(second, small.run(), slack=50)
    assert graphs == 1


@pytest.mark.parametrize("first", [True, False], ids=["before enable", "after enable"])
@BOTH
def test_int8_weights_of_torchao(regional, first):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    small, alone = build("wan"), build("wan")
    torchao.quantize_(alone.pipe.transformer, torchao.Int8WeightOnlyConfig())
    expected = alone.run()
    if first:
        torchao.quantize_(small.pipe.transformer, torchao.Int8WeightOnlyConfig())
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        if not first:
            torchao.quantize_(small.pipe.transformer, torchao.Int8WeightOnlyConfig())
        assert_close(small.run(), expected, slack=50)
        sparse = _sparse(enabled)
    assert len(sparse) == BRANCHES * (STEPS - 1) * (LAYERS - 1)
    _assert_each_is_cold_once(sparse)


def _skip(**more: Any) -> Any:
    return LayerSkipConfig(indices=[1], fqn="blocks", **more)


GUIDERS = {
    "skip layer": lambda: diffusers.SkipLayerGuidance(
        5.0, skip_layer_config=_skip(), skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.8
    ),
    "perturbed attention": lambda: diffusers.PerturbedAttentionGuidance(
        5.0,
        perturbed_guidance_config=_skip(skip_attention=False, skip_ff=False, skip_attention_scores=True),
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=0.8,
    ),
    "interval": lambda: diffusers.ClassifierFreeGuidance(5.0, start=0.3, stop=0.8),
}


def _unchanged(processor: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _guided(small: SmallPipeline, guider: Any, steps: int) -> torch.Tensor:
    """The loop of a modular pipeline: the guider says what is called, and hooks the model for each call."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    transformer = small.pipe.transformer
    latents = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = small.arguments["prompt_embeds"], small.arguments["negative_prompt_embeds"]
    for step, timestep in enumerate(scheduler.timesteps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
        batches = guider.prepare_inputs({"encoder_hidden_states": prompts})
        for batch in batches:
            batch.noise_pred = _one_guided_call(transformer, guider, batch, latents, timestep)
        latents = scheduler.step(guider(batches)[0], timestep, latents, return_dict=False)[0]
    return latents


def _one_guided_call(transformer: Any, guider: Any, batch: Any, latents: torch.Tensor, timestep: Any) -> torch.Tensor:
    guider.prepare_models(transformer)
    with torch.no_grad(), transformer.cache_context(batch.__guidance_identifier__):
        inputs = {"timestep": timestep[None], "encoder_hidden_states": batch.encoder_hidden_states}
        output = transformer(hidden_states=latents, **inputs, return_dict=False)[0]
    guider.cleanup_models(transformer)
    return output


@BOTH
@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(name, regional, monkeypatch):
    """They hook and unhook layers between two calls, and leave branches out in some steps."""
    # Diffusers has not registered the attention of Wan yet, as perturbed attention needs it.
    known = {**AttentionProcessorRegistry._registry, WanAttnProcessor: AttentionProcessorMetadata(_unchanged)}
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", known)
    small = build("wan")
    expected = _guided(small, GUIDERS[name](), steps=5)
    with svg2_compile.enable(small.pipe.transformer, regional=regional, **{**EXACT, "strict": False}) as enabled:
        assert_close(_guided(small, GUIDERS[name](), steps=5), expected, slack=50)
        report = enabled.report()
    sparse = [run for run in report.runs if run.graph == "sparse"]
    assert sorted({run.step for run in report.runs}) == [0, 1, 2, 3, 4] and not report.notes
    _assert_each_is_cold_once(sparse)
    branches = {run.branch for run in sparse}
    assert len(branches) == (2 if name == "interval" else 3), branches


def _diffusion_forcing() -> SmallPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.SkyReelsV2Transformer3DModel(
            **{"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4},
            **{"out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": LAYERS},
            **{"rope_max_seq_len": 32, "inject_sample_info": False},
        ).eval()
        prompts = {"prompt_embeds": torch.randn(1, 12, 16), "negative_prompt_embeds": torch.randn(1, 12, 16)}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=8.0
    )
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": None, "height": 128, "width": 128, "num_frames": 17, "guidance_scale": 5.0, **prompts}
    return SmallPipeline(pipe, arguments, BRANCHES)


@BOTH
@pytest.mark.parametrize("frames_apart", [0, 2], ids=["synchronous", "asynchronous"])
def test_diffusion_forcing(regional, frames_apart):
    """Every frame has a scheduler of its own, a copy; that of the pipeline never makes a step."""
    small = _diffusion_forcing()
    expected = small.run(ar_step=frames_apart)
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        assert_close(small.run(ar_step=frames_apart), expected, slack=50)
        assert_close(small.run(ar_step=frames_apart), expected, slack=50)
        report = enabled.report()
    steps = max(run.step for run in report.runs) + 1
    assert steps == (STEPS if not frames_apart else STEPS + 4 * frames_apart)
    sparse = [run for run in report.runs if run.graph == "sparse"]
    assert len(sparse) == 2 * BRANCHES * (steps - 1) * (LAYERS - 1)
    _assert_each_is_cold_once(sparse)
    assert report.store_entries == 0
