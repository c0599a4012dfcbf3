"""The Dynamo door: every way to ask for it, bad input, and what must stay dense."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svg2_compile
from svg2_compile.codegen.inner_backend import compile_inner
from tests.support import IDENTITY, SELECTION, assert_close, at_timestep, first_output
from tests.zoo.models import build


class Block(nn.Module):
    """The smallest denoiser with a video self-attention: [B, N, 32] and a timestep in, [B, N, 32] out."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, hidden_states, timestep):
        angles = timestep.float()[:, None] * torch.linspace(0.1, 1, 16)
        shift = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]
        query, key, value = self.qkv(hidden_states + shift).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return hidden_states + self.out(attended.transpose(1, 2).flatten(2))


def _block(**arguments):
    torch.manual_seed(0)
    return Block(**arguments).eval()


def _video(batch=1, tokens=100, seed=0):
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_the_entry_point_needs_no_import():
    code = (
        "import torch, sys\n"
        "model = torch.nn.Linear(4, 4)\n"
        "assert 'svg2' in torch.compiler.list_backends()\n"
        "assert not any(name.startswith('svg2_compile.') for name in sys.modules)\n"
        "compiled = torch.compile(model, backend='svg2', options={'inner_backend': 'eager'})\n"
        "with torch.no_grad(): assert torch.equal(compiled(torch.ones(1, 4)), model(torch.ones(1, 4)))\n"
        "assert 'svg2_compile.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_fullgraph_and_dynamic(fullgraph, dynamic):
    model = _block()
    compiled = torch.compile(model, backend="svg2", fullgraph=fullgraph, dynamic=dynamic, options=IDENTITY)
    with torch.no_grad():
        for batch, tokens in ((1, 100), (1, 100), (1, 60), (2, 77), (1, 100)):
            video, timestep = _video(batch, tokens), torch.full((batch,), 900)
            assert_close(compiled(video, timestep), model(video, timestep))
    assert {run.graph for run in svg2_compile.report(model).runs} == {"sparse"}


def test_a_new_resolution_is_no_recompile_where_shapes_are_dynamic():
    model = _block()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="svg2", dynamic=True, options={**IDENTITY, "num_q_clusters": None})
    with torch.no_grad():
        for tokens in (100, 600, 35, 100):
            assert_close(
                compiled(_video(1, tokens), torch.tensor([900])), model(_video(1, tokens), torch.tensor([900]))
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    (site,) = svg2_compile.report(model).sites
    assert isinstance(site.video_tokens, str) and site.context_tokens == 0


def test_inductor_with_dynamic_shapes():
    model = _block()
    compiled = torch.compile(
        model, backend="svg2", dynamic=True, options={**IDENTITY, "inner_backend": "inductor", "strict": False}
    )
    with torch.no_grad():
        for tokens in (100, 64):
            assert_close(
                compiled(_video(1, tokens), torch.tensor([900])), model(_video(1, tokens), torch.tensor([900]))
            )


def test_module_compile_and_mode():
    model = _block()
    expected = model(_video(), torch.tensor([900])).detach()
    model.compile(backend="svg2", options=IDENTITY)
    with torch.no_grad():
        assert_close(model(_video(), torch.tensor([900])), expected)
    with torch.no_grad():
        compiled = torch.compile(_block(), backend="svg2", mode="max-autotune-no-cudagraphs")
        assert_close(compiled(_video(), torch.tensor([900])), expected)


def test_compile_repeated_blocks():
    module, inputs = build("wan_t2v")
    with torch.no_grad():
        expected = [first_output(module, at_timestep(inputs, t)) for t in (900, 900, 700)]
        torch._dynamo.utils.counters.clear()
        module.compile_repeated_blocks(backend="svg2", fullgraph=True, options=IDENTITY)
        for t, reference in zip((900, 900, 700), expected, strict=True):
            assert_close(first_output(module, at_timestep(inputs, t)), reference)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    runs = svg2_compile.report(module).runs
    # Two layers, each with its own count of steps and branches, told apart by their weights.
    assert [(run.layer, run.step, run.context, run.seeded) for run in runs] == [
        (0, 0, 0, False), (1, 0, 0, False), (0, 0, 1, False), (1, 0, 1, False), (0, 1, 0, True), (1, 1, 0, True)
    ]  # fmt: skip


@pytest.mark.slow
def test_dense_steps_are_bit_identical_to_inductor():
    module, inputs = build("wan_t2v")
    with torch.no_grad():
        # As svg2 calls it: without a C++ compiler both sides are "eager".
        alone = first_output(torch.compile(module, backend=lambda gm, ex: compile_inner(gm, ex, "inductor")), inputs)
        torch._dynamo.reset()
        options = {**SELECTION, "dense_steps": 1, "inner_backend": "inductor", "strict": False}
        compiled = torch.compile(module, backend="svg2", options=options)
        assert torch.equal(first_output(compiled, inputs), alone)
        later = first_output(compiled, at_timestep(inputs, 3))
    assert not torch.equal(later, alone) and later.isfinite().all()
    assert [run.graph for run in svg2_compile.report(module).runs] == ["dense"] * 2 + ["sparse"] * 2


def test_dense_layers_by_count_and_fraction():
    module, inputs = build("wan_t2v")
    for dense_layers in (1, 0.4):
        report = svg2_compile.explain(module, options={**IDENTITY, "dense_layers": dense_layers}, **inputs)
        assert [(s.name, s.reason) for s in report.sites if "attn1" in s.name] == [
            ("blocks.0.attn1", "dense_layer"),
            ("blocks.1.attn1", "sparse"),
        ]


def test_dense_layers_of_blocks_compiled_alone():
    module, inputs = build("wan_t2v")
    with torch.no_grad():
        module.compile_repeated_blocks(backend="svg2", options={**IDENTITY, "dense_layers": 1})
        first_output(module, inputs)
    assert [(run.layer, run.graph, run.reason) for run in svg2_compile.report(module).runs] == [
        (0, "dense", "dense_layers"),
        (1, "sparse", "sparse"),
    ]


def test_training_stays_dense_with_one_warning(caplog):
    model = _block().train()
    compiled = torch.compile(model, backend="svg2", options=IDENTITY)
    with caplog.at_level(logging.WARNING, "svg2_compile"):
        for _ in range(2):
            compiled(_video(), torch.tensor([900])).sum().backward()
    assert model.qkv.weight.grad is not None
    assert sum("gradients" in record.message for record in caplog.records) == 1
    assert svg2_compile.report(model).runs == []


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_grad_modes_and_autocast(context):
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    model = _block().requires_grad_(False)
    compiled = torch.compile(model, backend="svg2", fullgraph=True, options=IDENTITY)
    with contexts[context]():
        for timestep in (900, 700):
            assert_close(
                compiled(_video(), torch.tensor([timestep])), model(_video(), torch.tensor([timestep])), slack=500
            )
    runs = svg2_compile.report(model).runs
    assert [(run.graph, run.seeded) for run in runs] == [("sparse", False), ("sparse", True)]


def test_the_same_program_in_and_out_of_inference_mode():
    model = _block()
    compiled = torch.compile(model, backend="svg2", options=IDENTITY)
    for timestep, context in ((900, torch.inference_mode), (800, torch.no_grad), (700, torch.inference_mode)):
        with context():
            assert_close(compiled(_video(), torch.tensor([timestep])), model(_video(), torch.tensor([timestep])))


def test_causal_attention_stays_dense():
    model = _block(causal=True)
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg2", options=IDENTITY)
        assert torch.equal(compiled(_video(), torch.tensor([1])), model(_video(), torch.tensor([1])))
    assert [site.reason for site in svg2_compile.explain(model, _video(), torch.tensor([1])).sites] == ["causal"]


def test_a_model_without_attention():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg2", options=IDENTITY)
        assert torch.equal(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))
        report = svg2_compile.explain(model, torch.ones(2, 4))
    assert report.sites == [] and "0 of 0" in str(report)


class Timeless(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states, torch.zeros(1))


def test_a_timestep_that_cannot_be_found(caplog):
    torch.manual_seed(0)
    model = Timeless().eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "svg2_compile"):
        compiled = torch.compile(model, backend="svg2", options={**SELECTION, "dense_steps": 3})
        assert torch.equal(compiled(_video()), model(_video()))
        assert [(run.graph, run.reason) for run in svg2_compile.report(model).runs] == [("dense", "no_timestep")]
        torch._dynamo.reset()
        cold = torch.compile(model, backend="svg2", options=IDENTITY)
        for _ in range(2):
            assert_close(cold(_video()), model(_video()))
    assert "enable(pipe)" in caplog.text
    runs = [run for run in svg2_compile.report(model).runs if run.graph == "sparse"]
    assert [run.seeded for run in runs] == [False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_pp": 0.9}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_q_clusters": 0}, "num_q_clusters"),
        ({"preset": "wan3"}, "wan2.1-14b-720p"),
        ({"inner_backend": "svg2"}, "inner_backend"),
        ({"dense_steps": -1}, "dense_steps"),
    ],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.compile(_block(), backend="svg2", options=options)(_video(), torch.tensor([1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["one token", "everywhere"])
def test_non_finite_values_show_as_in_dense_attention(bad, where):
    model, video = _block(), _video()
    if where == "one token":
        video[0, 17, 3] = bad
    else:
        video[:] = bad
    with torch.no_grad():
        dense = model(video, torch.tensor([900]))
        sparse = torch.compile(model, backend="svg2", options=SELECTION)(video, torch.tensor([900]))
    assert torch.equal(sparse.isfinite(), dense.isfinite())


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 3), (0, 100), (3, 2)])
def test_small_and_empty_inputs(batch, tokens):
    model = _block()
    video, timestep = _video(batch, tokens), torch.full((batch,), 900)
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg2", options=IDENTITY)
        assert_close(compiled(video, timestep), model(video, timestep))


def test_an_unsupported_dtype_stays_dense():
    model = _block().double()
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg2", options=IDENTITY)
        video = _video().double()
        assert torch.equal(compiled(video, torch.tensor([900])), model(video, torch.tensor([900])))
    assert svg2_compile.explain(model, video, torch.tensor([900])).sites[0].reason == "unsupported_dtype"


def test_a_failing_pass_leaves_the_graph_dense(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr("svg2_compile.pipeline.analyse_token_layout", fail)
    model = _block()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "svg2_compile"):
        compiled = torch.compile(model, backend="svg2", options={**IDENTITY, "strict": False})
        assert torch.equal(compiled(_video(), torch.tensor([1])), model(_video(), torch.tensor([1])))
        assert "no luck" in caplog.text and "strict=True" in caplog.text
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no luck"):
            torch.compile(model, backend="svg2", options=IDENTITY)(_video(), torch.tensor([1]))


def test_dumps_show_the_graph_before_and_after(tmp_path):
    with torch.no_grad():
        options = {**IDENTITY, "dump_dir": str(tmp_path)}
        torch.compile(_block(), backend="svg2", options=options)(_video(), torch.tensor([1]))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "04_sparsify.after.py", "04_sparsify.before.py", "05_hoist_centroids.after.py", "05_hoist_centroids.before.py"
    ]  # fmt: skip
    assert "svg2.kmeans" in (folder / "04_sparsify.after.py").read_text()
    assert "svg2_iters" in (folder / "05_hoist_centroids.after.py").read_text()


def test_a_sparse_graph_that_cannot_be_compiled_stays_dense(monkeypatch, caplog):
    """No failure of ours ends the user's call."""

    def compile_or_fail(gm, *rest, **options):
        if any("svg2" in str(node.target) for node in gm.graph.nodes):
            raise NotImplementedError("no code for this")
        return compile_inner(gm, *rest, **options)

    monkeypatch.setattr("svg2_compile.backend.compile_inner", compile_or_fail)
    module, inputs = build("wan_t2v")
    compiled = torch.compile(module, backend="svg2", options={**IDENTITY, "strict": False})
    with torch.no_grad():
        assert_close(first_output(compiled, inputs), first_output(module, inputs))
    assert "no code for this" in caplog.text
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="no code for this"):
        torch.compile(module, backend="svg2", options=IDENTITY)(**inputs)
