"""Diffusers' own pipelines: steps and guidance branches counted right, clean videos, the right result."""

from __future__ import annotations

import copy

import pytest
import torch

import svg2_compile
from tests.e2e.pipelines import PIPELINES, build
from tests.support import IDENTITY, SELECTION, assert_close


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_as_before(name, regional):
    small = build(name)
    expected = small.run(steps=4)
    options = {**IDENTITY, "dense_steps": 0.25}
    with svg2_compile.enable(small.pipe, regional=regional, **options) as enabled:
        assert_close(small.run(steps=4), expected, slack=20)
        report = enabled.report()
    seen = sorted({(run.step, run.context, run.graph) for run in report.runs})
    assert seen == [
        (step, context, "dense" if step == 0 else "sparse")
        for step in range(4)
        for context in range(small.guidance_branches)
    ]


def test_the_second_video_is_the_first_again():
    small = build("wan")
    with svg2_compile.enable(small.pipe, **SELECTION) as enabled:
        first, second = small.run(), small.run()
        assert torch.equal(first, second)
        cold = [run for run in enabled.report().runs if not run.seeded]
    # Once per video, guidance branch and layer.
    assert [(run.video, run.step) for run in cold] == [(0, 0)] * 6 + [(1, 0)] * 6


@pytest.mark.parametrize("how", ["exception", "interrupt"])
def test_an_interrupted_video_leaves_nothing_behind(how):
    small = build("wan")

    def stop(pipe, step, timestep, arguments):
        if step == 1:
            if how == "exception":
                raise Interrupted
            pipe._interrupt = True
        return arguments

    with svg2_compile.enable(small.pipe, **SELECTION):
        expected = small.run()
        if how == "exception":
            with pytest.raises(Interrupted):
                small.run(callback_on_step_end=stop)
        else:
            small.run(callback_on_step_end=stop)
        assert torch.equal(small.run(), expected)


def _entries_in_every_step(small, enabled, **arguments):
    """How many sets of centroids are kept at the end of every step of a video."""
    kept = []

    def look(pipe, step, timestep, given):
        kept.append(enabled.report().store_entries)
        return given

    small.run(callback_on_step_end=look, **arguments)
    return kept


def test_guidance_branches_keep_their_own_centroids_until_the_last_step():
    small = build("wan")
    with svg2_compile.enable(small.pipe, **SELECTION) as enabled:
        kept = _entries_in_every_step(small, enabled)
        report = enabled.report()
    assert {(run.context, run.branch) for run in report.runs} == {(0, "('cond', 0)"), (1, "('uncond', 0)")}
    # Two branches, one entry each: the graph's three layers are kept together. The last step needs none afterwards.
    assert kept == [2, 2, 2, 0]
    assert report.store_bytes == 0


def test_two_experts_keep_their_own_centroids():
    small = build("wan_two_experts")
    with svg2_compile.enable(small.pipe, **SELECTION) as enabled:
        kept = _entries_in_every_step(small, enabled, steps=6)
        report = enabled.report()
    sites = {run.site.split(".")[0] for run in report.runs}
    assert sites == {"transformer", "transformer_2"}
    cold = [
        (run.site.split(".")[0], run.context) for run in report.runs if not run.seeded and run.site.endswith("0.attn1")
    ]
    assert cold == [("transformer", 0), ("transformer", 1), ("transformer_2", 0), ("transformer_2", 1)]
    # What the first expert leaves behind goes with the last step of the schedule.
    assert kept[-2:] == [4, 0]


def test_two_pipelines_in_one_process_do_not_mix():
    alone = build("wan")
    with svg2_compile.enable(alone.pipe, **SELECTION):
        expected = alone.run()
    one, other = build("wan"), build("wan")
    for parameter in other.pipe.transformer.parameters():
        parameter.data.mul_(1.3)
    with svg2_compile.enable(one.pipe, **SELECTION), svg2_compile.enable(other.pipe, **SELECTION):
        other.run(steps=2)
        assert torch.equal(one.run(), expected)


def test_disable_puts_everything_back():
    small = build("wan")
    pipe = small.pipe
    expected = small.run(steps=2)
    scheduler, transformer = dict(vars(pipe.scheduler)), dict(vars(pipe.transformer))
    svg2_compile.enable(pipe, **IDENTITY)
    assert vars(pipe.scheduler).keys() != scheduler.keys() and vars(pipe.transformer) != transformer
    svg2_compile.disable(pipe)
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert vars(pipe.transformer) == transformer
    assert torch.equal(small.run(steps=2), expected)
    svg2_compile.disable(pipe)


def test_a_copied_scheduler_is_not_counted():
    small = build("wan")
    with svg2_compile.enable(small.pipe, **IDENTITY) as enabled:
        copied = copy.deepcopy(small.pipe.scheduler)
        copied.set_timesteps(3)
        sample = torch.zeros(1, 4, 2, 16, 16)
        copied.step(sample, copied.timesteps[0], sample)
        assert enabled.session.step_count.steps_of(small.pipe.scheduler) == 0
        assert enabled.session.step_count.steps_of(copied) is None
        assert len(copied.timesteps) == 3 and len(small.pipe.scheduler.timesteps) != 3


def test_enabling_twice_takes_the_new_options():
    small = build("wan")
    svg2_compile.enable(small.pipe, **IDENTITY)
    with svg2_compile.enable(small.pipe, **{**IDENTITY, "dense_steps": 2}) as enabled:
        small.run(steps=3)
        assert {run.step for run in enabled.report().runs if run.graph == "dense"} == {0, 1}
    assert small.pipe.transformer._compiled_call_impl is None


def test_bad_targets_are_named():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or a diffusers pipeline.*str"):
        svg2_compile.enable("pipe")
    with pytest.raises(TypeError, match="set_timesteps"):
        svg2_compile.enable(torch.nn.Linear(2, 2), scheduler=object())
    with pytest.raises(ValueError, match="no repeated blocks"):
        svg2_compile.enable(torch.nn.Linear(2, 2), regional=True)
    with pytest.raises(ValueError, match="top_p"):
        svg2_compile.enable(torch.nn.Linear(2, 2), top_pp=0.5)
    with pytest.raises(TypeError, match="not enabled"):
        svg2_compile.report(object())
