"""The settings that people run in production: schedulers exchanged, pipelines per request, threads, caches, offloading,
adapters. In each: sparse where it should be, the right result, requests apart, and nothing silent.
"""

from __future__ import annotations

import collections
import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import svg2_compile
from tests.e2e.pipelines import BRANCHES, EXACT, LAYERS, STEPS, SmallPipeline, build
from tests.support import SELECTION, assert_close

# dense_layers as published: one of the three layers.
ONE_DENSE_LAYER = {**SELECTION, "dense_layers": 0.03, "dense_steps": 1}


def _counts(enabled: Any) -> dict[str, int]:
    return dict(collections.Counter(run.reason for run in enabled.report().runs))


def _as_in_one_graph(videos: int = 1) -> dict[str, int]:
    """A step dense, a layer of three dense (in its own graph, not among the sites), the rest sparse."""
    return {"dense_steps": videos * BRANCHES * (LAYERS - 1), "sparse": videos * BRANCHES * (LAYERS - 1) * (STEPS - 1)}


def _as_in_block_graphs(videos: int = 1) -> dict[str, int]:
    calls = videos * BRANCHES * (STEPS - 1)
    return {"dense_steps": videos * BRANCHES * LAYERS, "dense_layers": calls, "sparse": calls * (LAYERS - 1)}


def _own_pipeline(small: SmallPipeline) -> SmallPipeline:
    """Another pipeline over the same transformer, with a copy of the scheduler: one a request."""
    scheduler = copy.deepcopy(small.pipe.scheduler)
    pipe = type(small.pipe)(**{**small.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return SmallPipeline(pipe, small.arguments, small.guidance_branches)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_is_exchanged(name, regional):
    """Before the first video and between two; each video begins dense, and none continues from another."""
    small = build("wan")
    with svg2_compile.enable(small.pipe, regional=regional, **ONE_DENSE_LAYER) as enabled:
        small.run()
        before = len(enabled.report().runs)
        small.pipe.scheduler = SCHEDULERS[name]()
        first = small.run()
        small.pipe.scheduler = SCHEDULERS[name]()
        assert torch.equal(small.run(), first)
        runs = enabled.report().runs[before:]
        steps = len(small.pipe.scheduler.timesteps)
    assert {run.source for run in runs} == {"scheduler"}
    assert sorted({(run.video, run.step) for run in runs}) == [(v, s) for v in (1, 2) for s in range(steps)]
    assert all((run.reason == "dense_steps") == (run.step == 0) for run in runs)
    assert [run.step for run in runs if run.graph == "sparse" and not run.seeded] == [1] * (2 * BRANCHES * (LAYERS - 1))


def test_a_pipeline_for_every_request():
    small = build("wan")
    with svg2_compile.enable(small.pipe, **ONE_DENSE_LAYER) as enabled:
        expected = small.run()
        for _ in range(2):
            assert torch.equal(_own_pipeline(small).run(), expected)
        assert _counts(enabled) == _as_in_one_graph(videos=3)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_threads_with_a_pipeline_each(regional):
    """To the bit as alone."""
    small = build("wan")
    with svg2_compile.enable(small.pipe, regional=regional, **ONE_DENSE_LAYER) as enabled:
        expected = [small.run(seed=seed) for seed in range(3)]
        enabled.reset()
        results: dict[int, torch.Tensor] = {}

        def work(seed: int) -> None:
            results[seed] = _own_pipeline(small).run(seed=seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [torch.equal(results[seed], expected[seed]) for seed in range(3)] == [True] * 3
        assert enabled.report().store_entries == 0


def test_a_fraction_of_layers_is_counted_once_for_both_branches():
    small = build("wan")
    with svg2_compile.enable(small.pipe, regional=True, **{**ONE_DENSE_LAYER, "dense_layers": 0.3}) as enabled:
        small.run()
        assert _counts(enabled) == _as_in_block_graphs()
        assert enabled.report().dense_layers == ["blocks.0"]
        assert "stay dense by dense_layers: blocks.0" in str(enabled.report())


@pytest.mark.parametrize("how", ["enable", "plain"])
def test_more_windows_than_fit_are_clustered_anew(how):
    """Context windows: twelve model calls in a step, room for the centroids of some of them."""
    small = build("wan")
    model = small.pipe.transformer
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(12, 1, 4, 2, 16, 16, generator=generator)
    text = torch.randn(1, 12, 16, generator=generator)

    def run(call: Any) -> None:
        with torch.no_grad():
            for t in (999, 800, 600):
                for window in windows:
                    call(window, timestep=torch.tensor([t]), encoder_hidden_states=text)

    options = {**SELECTION, "store_limit_mb": 0.02}
    if how == "enable":
        with svg2_compile.enable(model, **options) as enabled:
            run(model)
            report = enabled.report()
    else:
        run(torch.compile(model, backend="svg2", options=options))
        report = svg2_compile.report(model)
    runs = [run for run in report.runs if run.site.endswith("blocks.0.attn1")]
    assert {run.video for run in runs} == {0} and {run.context for run in runs} == set(range(12))
    kept = [run.context for run in runs if run.step == 2 and run.seeded]
    assert 0 < len(kept) < 12 and kept == list(range(len(kept)))
    assert report.store_bytes <= 0.02 * 2**20


def test_a_guidance_interval():
    """A branch that is skipped in some steps; the pipeline's own cache_context tells which one runs."""
    small = build("wan")
    model, generator = small.pipe.transformer, torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 4, 2, 16, 16, generator=generator), torch.randn(2, 1, 12, 16, generator=generator)

    def run(names_of: Callable[[int], tuple[str, ...]]) -> list[torch.Tensor]:
        outputs = []
        for step, t in enumerate((999, 800, 600, 400, 200)):
            for name in names_of(step):
                with model.cache_context(name), torch.no_grad():
                    inputs = {"timestep": torch.tensor([t]), "encoder_hidden_states": text[int(name == "cond")]}
                    outputs.append(model(video, **inputs, return_dict=False)[0])
        return outputs

    with svg2_compile.enable(model, **SELECTION) as enabled:
        alone = run(lambda step: ("cond",))
        enabled.reset()
        both = run(lambda step: ("cond",) if step in (2, 3) else ("uncond", "cond"))
    conditional = [both[i] for i in (1, 3, 4, 5, 7)]
    assert all(torch.equal(a, b) for a, b in zip(alone, conditional, strict=True))


def test_two_requests_interleaved_on_one_compiled_model():
    small = build("wan")
    model, generator = small.pipe.transformer, torch.Generator().manual_seed(0)
    videos, text = torch.randn(2, 1, 4, 2, 16, 16, generator=generator), torch.randn(1, 12, 16, generator=generator)
    compiled = torch.compile(model, backend="svg2", options=SELECTION)
    schedule = [999, 800, 600, 400, 200]

    def call(which: int, step: int) -> torch.Tensor:
        inputs = {"timestep": torch.tensor([schedule[step]]), "encoder_hidden_states": text}
        with torch.no_grad():
            return compiled(videos[which], **inputs, return_dict=False)[0]

    alone = []
    for which in range(2):
        svg2_compile.reset(model)
        alone.append([call(which, step) for step in range(5)])
    svg2_compile.reset(model)
    together: list[list[torch.Tensor]] = [[], []]
    for turn in range(7):
        for which, step in ((0, turn), (1, turn - 2)):
            if 0 <= step < 5:
                together[which].append(call(which, step))
    for mine, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_video_to_video_counts_the_steps_that_run():
    small = build("wan")
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: small.pipe.components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = {name: value for name, value in small.arguments.items() if name != "num_frames"}
    options = {**SELECTION, "dense_steps": 0.25}
    with svg2_compile.enable(pipe, **options) as enabled:
        pipe(**arguments, latents=latents, num_inference_steps=10, strength=0.4, output_type="latent")
        runs = enabled.report().runs
    assert [(run.step, run.graph) for run in runs[:: LAYERS * BRANCHES]] == [
        (0, "dense"), (1, "sparse"), (2, "sparse"), (3, "sparse")
    ]  # fmt: skip


def test_disable_lets_go_of_the_centroids():
    small = build("wan")
    enabled = svg2_compile.enable(small.pipe, **SELECTION)

    def stop(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        if step == 1:
            pipe._interrupt = True
        return given

    small.run(callback_on_step_end=stop)
    assert enabled.report().store_bytes > 0
    enabled.disable()
    assert enabled.report().store_bytes == 0


def test_a_video_without_a_sparse_step_is_said(caplog):
    small = build("wan")
    options = {**SELECTION, "dense_steps": 10}
    with caplog.at_level(logging.WARNING, logger="svg2_compile"), svg2_compile.enable(small.pipe, **options) as enabled:
        small.run()
        small.run()
        report = enabled.report()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "a whole video ran without one sparse attention: dense_steps" in said[0]
    assert "fewer dense_steps" in said[0] and said[0] in report.notes and "without one sparse" in str(report)


def test_blocks_that_a_pipeline_calls_itself():
    """regional=True serves them, with the steps of the pipeline; else the model is never called, which is said."""
    small = build("wan")
    model = small.pipe.transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, text, modulation = torch.randn(1, 128, 24), torch.randn(1, 12, 24), torch.randn(1, 6, 24)
    rotary = model.rope(torch.zeros(1, 4, 2, 16, 16))

    class Pipeline:
        def __init__(self) -> None:
            self.components, self.scheduler = small.pipe.components, small.pipe.scheduler

        def __call__(self) -> torch.Tensor:
            self.scheduler.set_timesteps(STEPS)
            x = hidden
            for t in self.scheduler.timesteps:
                for block in model.blocks:
                    x = block(x, text, modulation, rotary)
                self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
            return x

    pipe = Pipeline()
    with torch.no_grad():
        expected = pipe()
        with svg2_compile.enable(pipe, regional=True, **EXACT) as enabled:
            assert_close(pipe(), expected, slack=50)
            assert _counts(enabled) == {"dense_steps": LAYERS, "dense_layers": STEPS - 1, "sparse": 2 * (STEPS - 1)}
        with svg2_compile.enable(pipe, **EXACT) as enabled:
            pipe()
            assert "was never called" in str(enabled.report())


def test_two_targets_over_one_transformer():
    """The latest answers; whichever goes first, what was there comes back."""
    for first_out in (0, 1):
        small = build("wan")
        expected = small.run(steps=2)
        before = dict(vars(small.pipe.transformer))
        other = _own_pipeline(small)
        handles = [svg2_compile.enable(small.pipe, **EXACT), svg2_compile.enable(other.pipe, **EXACT)]
        assert_close(other.run(steps=2), expected, slack=20)
        assert [len(handle.report().runs) > 0 for handle in handles] == [False, True]
        handles[first_out].disable()
        assert_close(small.run(steps=2), expected, slack=20)
        assert len(handles[1 - first_out].report().runs) > 0
        handles[1 - first_out].disable()
        assert vars(small.pipe.transformer) == before
        assert torch.equal(small.run(steps=2), expected)


def test_a_model_that_is_compiled_already():
    small = build("wan")
    model = small.pipe.transformer
    expected = small.run(steps=2)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    with svg2_compile.enable(small.pipe, **EXACT) as enabled:
        assert_close(small.run(steps=2), expected, slack=20)
        assert _counts(enabled)["sparse"] > 0
    assert model._compiled_call_impl is compiled
    assert_close(small.run(steps=2), expected, slack=20)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_compilation_around_an_enabled_model(regional):
    small = build("wan")
    expected = small.run()
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        small.pipe.transformer = torch.compile(small.pipe.transformer, backend="eager")
        assert_close(small.run(), expected, slack=20)
        assert _counts(enabled)["sparse"] == BRANCHES * (STEPS - 1) * (LAYERS - 1)


def test_a_copy_of_an_enabled_model_is_its_own():
    small = build("wan")
    model = small.pipe.transformer
    with svg2_compile.enable(model, **SELECTION):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.5)
            inputs = {"timestep": torch.tensor([900]), "encoder_hidden_states": torch.randn(1, 12, 16)}
            video = torch.randn(1, 4, 2, 16, 16)
            with copied.cache_context("cond"):
                out = copied(video, **inputs, return_dict=False)[0]
            assert torch.equal(out, copied._call_impl(video, **inputs, return_dict=False)[0])
        with svg2_compile.enable(copied, **SELECTION):
            assert copied._compiled_call_impl is not None
        assert "_compiled_call_impl" not in vars(copied)
