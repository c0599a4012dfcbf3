"""Run time: what a long-lived process does to a compiled model, and all of it clean."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

import svg2_compile
from svg2_compile.runtime.program import DenoisingProgram
from svg2_compile.runtime.session import sessions
from tests.support import IDENTITY, SELECTION, assert_close, at_timestep, first_output
from tests.zoo.models import build


def _denoise(model, inputs, timesteps=(900, 700, 500)):
    with torch.no_grad():
        return [first_output(model, at_timestep(inputs, timestep)) for timestep in timesteps]


def _with_frames(inputs, frames, batch=1):
    generator = torch.Generator().manual_seed(frames)
    video = torch.randn(batch, 4, frames, 16, 16, generator=generator)
    text = inputs["encoder_hidden_states"][:1].expand(batch, -1, -1)
    return {**inputs, "hidden_states": video, "encoder_hidden_states": text, "timestep": torch.full((batch,), 5)}


def test_two_videos_in_a_row_are_equal():
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options=SELECTION)
    first, second = _denoise(compiled, inputs), _denoise(compiled, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    runs = svg2_compile.report(module).runs
    assert [(run.video, run.step) for run in runs if not run.seeded] == [(0, 0)] * 2 + [(1, 0)] * 2


def test_reset_forgets_everything():
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options=SELECTION)
    _denoise(compiled, inputs)
    svg2_compile.reset(module)
    report = svg2_compile.report(module)
    assert (report.store_bytes, report.store_entries) == (0, 0)
    _denoise(compiled, inputs, (300,))
    assert not svg2_compile.report(module).runs[-1].seeded


def test_alternating_resolutions_and_batch_sizes():
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options=IDENTITY)
    sizes = [(2, 1), (3, 1), (2, 1), (2, 2), (3, 1)]
    for frames, batch in sizes:
        call = _with_frames(inputs, frames, batch)
        for sparse, dense in zip(_denoise(compiled, call), _denoise(module, call), strict=True):
            assert_close(sparse, dense)
    runs = svg2_compile.report(module).runs
    # Every video starts cold, whatever came before it.
    assert sum(not run.seeded for run in runs) == 2 * len(sizes)


def test_a_new_size_in_the_middle_of_a_video_starts_cold():
    module, inputs = build("wan_t2v")
    with svg2_compile.enable(module, dynamic=True, **IDENTITY) as enabled, torch.no_grad():
        for frames, timestep in ((2, 900), (3, 700), (3, 500)):
            call = at_timestep(_with_frames(inputs, frames), timestep)
            assert_close(first_output(module, call), module._call_impl(**call)[0])
        runs = enabled.report().runs
    assert [run.seeded for run in runs[::2]] == [False, False, True]


def test_an_exception_in_a_sparse_call_leaves_no_centroids(monkeypatch):
    module, inputs = build("wan_t2v")
    with svg2_compile.enable(module, **SELECTION) as enabled, torch.no_grad():
        expected = [first_output(module, at_timestep(inputs, t)) for t in (900, 700)]
        (program,) = enabled.session.programs
        run = program.sparse._run
        monkeypatch.setattr(program.sparse, "_run", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            first_output(module, at_timestep(inputs, 500))
        assert enabled.session.store.num_entries == 0
        monkeypatch.setattr(program.sparse, "_run", run)
        again = [first_output(module, at_timestep(inputs, t)) for t in (900, 700)]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_moving_weights_keeps_the_layers_apart():
    """Offloading replaces the data under every Parameter; its identity stays."""
    module, inputs = build("wan_t2v")
    with torch.no_grad():
        module.compile_repeated_blocks(backend="svg2", options=IDENTITY)
        first_output(module, at_timestep(inputs, 900))
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        first_output(module, at_timestep(inputs, 700))
    runs = svg2_compile.report(module).runs
    assert [(run.layer, run.step, run.seeded) for run in runs] == [
        (0, 0, False), (1, 0, False), (0, 1, True), (1, 1, True)
    ]  # fmt: skip


def test_replaced_parameters_are_followed_by_module_when_enabled():
    """Sequential offloading makes new Parameter objects for every call."""
    module, inputs = build("wan_t2v")
    with svg2_compile.enable(module, regional=True, **IDENTITY) as enabled, torch.no_grad():
        for timestep in (900, 700):
            for part in module.modules():
                for name, parameter in list(part._parameters.items()):
                    if parameter is not None:
                        part._parameters[name] = torch.nn.Parameter(parameter.data.clone(), requires_grad=False)
            first_output(module, at_timestep(inputs, timestep))
        runs = enabled.report().runs
    assert [(run.site, run.step, run.seeded) for run in runs] == [
        ("blocks.0.attn1", 0, False),
        ("blocks.1.attn1", 0, False),
        ("blocks.0.attn1", 1, True),
        ("blocks.1.attn1", 1, True),
    ]


def test_a_lora_loaded_in_between():
    peft = pytest.importorskip("peft")
    module, inputs = build("wan_t2v")
    with svg2_compile.enable(module, **IDENTITY) as enabled, torch.no_grad():
        before = first_output(module, at_timestep(inputs, 900))
        module.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        for timestep in (900, 700):
            call = at_timestep(inputs, timestep)
            assert_close(first_output(module, call), module._call_impl(**call)[0])
        assert not torch.allclose(before, first_output(module, at_timestep(inputs, 900)))
        assert {run.graph for run in enabled.report().runs} == {"sparse"}


def test_centroids_die_with_the_model():
    module, inputs = build("wan_t2v")
    before = set(sessions())
    compiled = torch.compile(module, backend="svg2", options=IDENTITY)
    _denoise(compiled, inputs)
    (session,) = set(sessions()) - before
    store, watched = session.store, weakref.ref(module.blocks[0].attn1.to_q.weight)
    del compiled, module, session, before
    gc.collect()
    assert watched() is None
    assert (store.num_entries, store.num_bytes) == (0, 0)


def test_an_enabled_module_is_not_kept_alive():
    module, inputs = build("wan_t2v")
    enabled = svg2_compile.enable(module, **IDENTITY)
    _denoise(module, inputs)
    watched, store = weakref.ref(module), enabled.session.store
    assert store.num_entries == 1
    del module
    gc.collect()
    assert watched() is None
    assert store.num_entries == 0


def test_the_store_is_bounded():
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options={**IDENTITY, "store_limit_mb": 1e-3})
    with torch.no_grad():
        for timestep in (900, 900, 700, 700):
            first_output(compiled, at_timestep(inputs, timestep))
    report = svg2_compile.report(module)
    assert report.store_entries == 1
    # The first branch is kept, the second is clustered anew in every step.
    assert [(run.step, run.context, run.seeded) for run in report.runs[::2]] == [
        (0, 0, False), (0, 1, False), (1, 0, True), (1, 1, False)
    ]  # fmt: skip


def test_a_fraction_of_an_unknown_schedule_is_taken_from_the_timestep(caplog):
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options={**IDENTITY, "dense_steps": 0.3})
    _denoise(compiled, inputs, (1000, 800, 600, 400))
    runs = svg2_compile.report(module).runs
    assert [run.graph for run in runs[::2]] == ["dense", "dense", "sparse", "sparse"]
    assert "fraction of the timestep's range" in caplog.text


def test_report_after_a_run(tmp_path):
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options={**SELECTION, "dense_steps": 1})
    _denoise(compiled, inputs)
    report = svg2_compile.report(module)
    assert report.density_per_step()[0] == 1.0
    assert 0 < report.density_per_step()[1] < 1 and 0 < report.mean_density < 1
    assert [(run.iters, run.seeded) for run in report.runs[::2]] == [(0, False), (3, False), (1, True)]
    report.to_jsonl(tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["site"] * 4 + ["run"] * 6
    assert lines[-1]["density"] == report.runs[-1].density and len(lines[-1]["density_per_head"][0]) == 2
    text = str(report)
    assert "blocks.0-1.attn1" in text and "cross_attention" in text and max(map(len, text.splitlines())) <= 100


def test_one_host_read_per_model_call_and_none_with_a_scheduler():
    module, inputs = build("wan_t2v")
    before = set(sessions())
    with torch.no_grad():
        module.compile_repeated_blocks(backend="svg2", options=IDENTITY)
        for timestep in (900, 900, 700):
            first_output(module, at_timestep(inputs, timestep))
    (session,) = set(sessions()) - before
    (program,) = session.programs
    assert program.time_reader.reads == 3


@pytest.mark.parametrize("strict", [False, True])
def test_a_sparse_graph_that_fails_does_not_end_the_call(strict, monkeypatch, caplog):
    module, inputs = build("wan_t2v")

    def failing(*_):
        raise RuntimeError("no such kernel")

    with torch.no_grad():
        expected = first_output(module, at_timestep(inputs, 700))
        with svg2_compile.enable(module, **{**IDENTITY, "dense_steps": 0, "strict": strict}) as enabled:
            monkeypatch.setattr(DenoisingProgram, "_run_sparse", failing)
            if strict:
                with pytest.raises(RuntimeError, match="no such kernel"):
                    first_output(module, at_timestep(inputs, 700))
                return
            for _ in range(2):
                assert_close(first_output(module, at_timestep(inputs, 700)), expected)
            report = enabled.report()
    assert {run.reason for run in report.runs} == {"failed"} and report.store_entries == 0
    assert any("no such kernel" in note for note in report.notes)
    assert sum("no such kernel" in record.getMessage() for record in caplog.records) == 1
