"""Pairs of runs: what is compared is what was asked for, and nothing else differs."""

from __future__ import annotations

import json
import math

import pytest
import torch

import svg2_compile
from svg2_compile.compare.html import render
from svg2_compile.compare.paired import compare_subject
from svg2_compile.compare.subjects import Subject, pipeline_subject, shipped_subject
from tests.e2e.pipelines import build
from tests.support import IDENTITY, SELECTION


def pipeline_arguments(small, steps=4):
    return {**small.arguments, "num_inference_steps": steps}


def test_a_pipeline_with_every_cluster_kept_is_nearly_identical():
    small = build("wan")
    compared = svg2_compile.compare_with_dense(small.pipe, pipeline_arguments(small), seed=3, **IDENTITY)
    assert compared.psnr > 80 and compared.ssim > 0.9999 and not compared.identical
    assert compared.density.mean_overall == pytest.approx(1.0)
    assert compared.density.sparse.all()
    assert compared.latent and compared.facts["seed"] == 3
    assert small.pipe.transformer._compiled_call_impl is None


def test_a_pipeline_with_a_selection_differs_and_the_dense_side_is_the_pipelines_own():
    small = build("wan")
    alone = small.run(steps=4, seed=1)[0]
    subject = pipeline_subject(small.pipe, pipeline_arguments(small), seed=1)
    compared = compare_subject(subject, **SELECTION)
    assert 5 < compared.psnr < 60
    assert compared.density.mean_sparse < 0.9
    span = alone.max() - alone.min()
    assert torch.allclose(compared.dense.video, (alone - alone.min()) / span * 2 - 1, atol=1e-5)


def test_dense_steps_differ_in_no_bit_and_nothing_sparse_is_said(subject):
    compared = compare_subject(subject, **{**SELECTION, "dense_steps": 5})
    assert compared.identical and math.isinf(compared.psnr)
    assert compared.density.mean_sparse is None and compared.speedup_of_sparse_steps is None
    assert "no attention was sparse" in str(compared) and "identical" in str(compared)
    assert compared.to_dict()["psnr"] is None and compared.to_dict()["identical"] is True
    page = render(compared)
    assert "No attention was sparse" in page and ">identical<" in page and "inf" not in page.split("<script")[0]


def test_steps_layers_and_heads_are_where_they_ran(comparison):
    table = comparison.density
    assert table.layers == ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    assert table.values.shape == (3, 5, 2)
    assert (table.values[0] == 1).all() and (table.values[:, :2] == 1).all()
    assert not table.sparse[0].any() and table.sparse[1:, 2:].all() and not table.sparse[:, :2].any()
    assert (table.values[1:, 2:] < 1).all()
    runs = [run for run in comparison.report.runs if (run.site, run.step) == ("blocks.2.attn1", 4)]
    expected = torch.tensor([run.density_per_head for run in runs]).mean((0, 1))
    assert len(runs) == 2  # guidance branches
    assert torch.allclose(table.values[2, 4].float(), expected)


def test_every_step_has_a_time(comparison):
    assert len(comparison.dense.step_seconds) == len(comparison.sparse.step_seconds) == 5
    assert min(comparison.dense.step_seconds + comparison.sparse.step_seconds) > 0
    dense, sparse = comparison.dense.step_seconds, comparison.sparse.step_seconds
    assert comparison.speedup_of_sparse_steps == pytest.approx(sum(dense[2:]) / sum(sparse[2:]))


def test_the_dictionary_is_json(comparison):
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["psnr"] == pytest.approx(comparison.psnr)
    assert len(data["density"]["layer_step_head"]) == 3
    assert data["maps"]["site"] == "blocks.2.attn1" and data["maps"]["step"] == 3


@pytest.mark.parametrize("name", ["wan_two_experts", "hunyuan", "cogvideox"])
def test_other_pipelines(name):
    """Two transformers in turn, guidance inside the model, latents with frames first."""
    small = build(name)
    compared = svg2_compile.compare_with_dense(small.pipe, pipeline_arguments(small), **SELECTION)
    assert not compared.identical and compared.psnr > 5
    assert compared.density.sparse.any(1).all() and compared.density.mean_sparse < 1
    assert len(compared.dense.step_seconds) == 4
    assert (compared.ssim is None) == (name == "hunyuan")  # 8 x 8 latents
    assert render(compared).count("<tr>") > 5


def test_packed_latents_are_refused():
    small = build("ltx")
    with pytest.raises(ValueError, match=r"5 axes, got a tensor \(1, 128, 4\)\. .* output_type='np'"):
        pipeline_subject(small.pipe, pipeline_arguments(small, 2), 0).generate(None)


def test_frames_of_every_kind_become_one_video():
    import numpy as np
    from PIL import Image

    from svg2_compile.compare.videos import as_video

    expected = torch.randint(0, 256, (3, 2, 6, 4), generator=torch.Generator().manual_seed(0)) / 255 * 2 - 1
    array = ((expected + 1) / 2).permute(1, 2, 3, 0).numpy()
    pictures = [Image.fromarray(np.round(frame * 255).astype(np.uint8)) for frame in array]
    output = type("Output", (), {"frames": array[None]})
    for given, kind in [
        (output, "np"),
        ([pictures], "pil"),
        (torch.from_numpy(array).permute(0, 3, 1, 2)[None], "pt"),
        (expected, None),
        ((expected[None],), None),
    ]:
        assert torch.allclose(as_video(given, kind), expected, atol=1e-5), kind
    frames_first = expected.transpose(0, 1)[None]
    assert torch.equal(as_video(frames_first, "latent", latent_channels=3), expected)
    with pytest.raises(TypeError, match=r"expected a video .* got int"):
        as_video(3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"promt": "a cat"}, {}, "promt: WanPipeline takes no such argument. Valid: prompt"),
        ({}, {"top_q": 0.5}, "unknown option 'top_q'. Did you mean 'top_p'"),
        ({}, {"collect_stats": False}, "collect_stats=False: .* Valid: True"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    small = build("wan")
    with pytest.raises(ValueError, match=message):
        svg2_compile.compare_with_dense(small.pipe, {**pipeline_arguments(small), **arguments}, **options)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a scheduler, got Linear"):
        svg2_compile.compare_with_dense(torch.nn.Linear(2, 2), {})


@pytest.mark.parametrize(
    ("prompt", "size", "steps", "message"),
    [
        ("a cat", (4, 32, 32), 4, "cannot read 'a cat'"),
        ("red brick disc up", (4, 30, 32), 4, "size=4x30x32: height and width are multiples of 4"),
        ("red brick disc up", (4, 32, 32), 1, "steps=1: a comparison needs at least 2"),
    ],
)
def test_wrong_requests_for_the_shipped_model_are_named(prompt, size, steps, message):
    with pytest.raises(ValueError, match=message):
        shipped_subject(prompt, 0, size, steps, 3.0)


def test_a_failing_run_leaves_the_model_as_it_was(subject, small_transformer):
    calls = []

    def generate(steps):
        calls.append(steps)
        if steps is None:
            raise KeyboardInterrupt
        return torch.zeros(3, 1, 16, 16)

    broken = Subject("x", subject.target, subject.scheduler, generate, {})
    with pytest.raises(KeyboardInterrupt):
        compare_subject(broken, **SELECTION)
    assert calls == [2, 2, None]
    assert small_transformer._compiled_call_impl is None
    assert not {"step", "set_timesteps"} & set(vars(subject.scheduler))


def test_the_shipped_models_subject_repeats_itself(monkeypatch):
    from svg2_compile.minidit import model

    torch.manual_seed(0)
    built = model.build_model().eval()
    torch.nn.init.normal_(built.proj_out.weight, std=0.02)
    monkeypatch.setattr(model, "load_model", lambda device: built)
    subject = shipped_subject("red brick disc up", 3, (2, 16, 16), 2, 3.0)
    first, second = subject.generate(None), subject.generate(None)
    assert first.shape == (3, 2, 16, 16) and torch.equal(first, second)
    assert not torch.equal(first, shipped_subject("red brick disc up", 4, (2, 16, 16), 2, 3.0).generate(None))
    assert subject.facts["tokens"] == 32 and subject.scheduler.num_inference_steps == 2
