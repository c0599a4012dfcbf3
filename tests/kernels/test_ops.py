"""The ops as a compiler and a user meet them: schemas, fakes, dispatch, opacity; and the rewritten attention,
whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg2_compile.kernels import dispatch, ops
from tests.kernels.helpers import attention_pipeline, check_identity, make_problem, masked_dense

SVG2 = torch.ops.svg2
SCHEMAS = {
    "kmeans": "(Tensor x, Tensor centroids, Tensor seeded, SymInt iters, Tensor? valid=None)"
    " -> (Tensor, Tensor, Tensor)",
    "cluster_order": "(Tensor labels, SymInt num_clusters, SymInt start, SymInt num_tokens, Tensor? valid=None)"
    " -> (Tensor, Tensor)",
    "select_blocks": "(Tensor q_centroids, Tensor k_centroids, Tensor q_sizes, Tensor k_sizes, float scale,"
    " float top_p, float min_k_ratio, float? density=None) -> Tensor",
    "permute_tokens": "(Tensor x, Tensor order) -> Tensor",
    "unpermute_tokens": "(Tensor x, Tensor order) -> Tensor",
    "cluster_means": "(Tensor x, Tensor offsets) -> Tensor",
    "block_sparse_attention": "(Tensor query, Tensor key, Tensor value, Tensor q_offsets, Tensor k_offsets,"
    " Tensor block_map, float scale, Tensor? k_centroids=None, Tensor? v_centroids=None, Tensor? q_order=None,"
    " Tensor? k_order=None, SymInt workspace_mb=256) -> (Tensor, Tensor)",
    "select_blocks_by_error": "(Tensor key, Tensor value, Tensor k_offsets, Tensor q_centroids, Tensor k_centroids,"
    " Tensor v_centroids, Tensor q_sizes, float scale, float top_p, float min_k_ratio, float? density=None) -> Tensor",
    "block_density": "(Tensor q_offsets, Tensor k_offsets, Tensor block_map) -> Tensor",
}


def sample_arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op, with and without its optional ones."""
    problem = make_problem(batch=2, q_heads=4, kv_heads=2, num_queries=50, num_keys=50)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 50, 16, generator=generator)
    valid = torch.rand(2, 1, 50, generator=generator) < 0.8
    labels, q_centroids, q_sizes = ops.kmeans(x, torch.zeros(2, 4, 4, 16), torch.tensor(False), 1)
    order, offsets = ops.cluster_order(labels, 4, 0, 50)
    k_sizes = problem.k_offsets.diff(dim=-1)[..., :9].contiguous()
    limits = (0.25, 0.9, 0.1)
    means = (q_centroids, problem.k_centroids, problem.v_centroids, q_sizes)
    tokens = (problem.key, problem.value, problem.k_offsets)
    by_mass = (q_centroids, problem.k_centroids, q_sizes, k_sizes, *limits)
    return {
        "kmeans": [(x, q_centroids, torch.tensor(True), 2), (x.bfloat16(), q_centroids, torch.tensor(False), 1, valid)],
        "cluster_order": [(labels, 4, 0, 50), (labels[..., :40].contiguous(), 4, 3, 50, valid)],
        "select_blocks": [by_mass, (*by_mass, 0.3)],
        "permute_tokens": [(x, order), (x.transpose(1, 2).contiguous().transpose(1, 2), order)],
        "unpermute_tokens": [(x, order)],
        "cluster_means": [(x, offsets)],
        "block_sparse_attention": [problem.args(), problem.args(True), (*problem.args(), order, order[:, :2], 64)],
        "select_blocks_by_error": [(*tokens, *means, *limits), (*tokens, *means, *limits, 0.3)],
        "block_density": [(problem.q_offsets, problem.k_offsets, problem.block_map)],
    }


ARGUMENTS = sample_arguments()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_the_documented_one(name: str) -> None:
    assert str(getattr(SVG2, name).default._schema) == f"svg2::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str) -> None:
    for args in ARGUMENTS[name]:
        torch.library.opcheck(getattr(SVG2, name).default, args)


@pytest.mark.parametrize("name", SCHEMAS)
def test_op_leaves_its_inputs_alone_and_is_deterministic(name: str) -> None:
    for args in ARGUMENTS[name]:
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        first, second = (getattr(SVG2, name).default(*args) for _ in range(2))
        for given_arg, kept in zip(args, before, strict=True):
            if isinstance(given_arg, Tensor):
                assert torch.equal(given_arg, kept)
        pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_ambient_autocast_changes_nothing(name: str, implementation: str) -> None:
    op = getattr(SVG2, name).default
    with ops.use_implementation(implementation):
        for args in ARGUMENTS[name]:
            plain = op(*args)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(op(*args), plain, rtol=0, atol=0)


def test_ops_import_without_triton_and_load_only_what_runs() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from svg2_compile.kernels import ops\n"
        "ops.permute_tokens(torch.ones(1, 1, 2, 3), torch.tensor([[[1, 0]]], dtype=torch.int32))\n"
        "assert 'svg2_compile.kernels.cpu.implementation' in sys.modules\n"
        "assert 'svg2_compile.kernels.reference.implementation' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_implementations_do_not_import_each_other() -> None:
    families = ("cpu", "reference")
    for name in families:
        sources = Path(str(dispatch.__file__)).parent.glob(f"{name}/*.py")
        imported = {line for file in sources for line in file.read_text().splitlines() if "svg2_compile" in line}
        assert imported
        assert [line for line in imported for other in families if other != name and f"kernels.{other}" in line] == []


def test_every_implementation_has_every_op() -> None:
    for implementation in dispatch.IMPLEMENTATIONS.values():
        module = __import__(implementation.module, fromlist=["_"])
        assert [name for name in SCHEMAS if not callable(getattr(module, name, None))] == []


def test_an_explicit_request_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg2_compile.kernels.cpu import implementation as cpu
    from svg2_compile.kernels.reference import implementation as reference

    calls: list[str] = []

    def recording(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            calls.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(cpu, "permute_tokens", recording("cpu", cpu.permute_tokens))
    monkeypatch.setattr(reference, "permute_tokens", recording("reference", reference.permute_tokens))
    args = ARGUMENTS["permute_tokens"][0]
    ops.permute_tokens(*args)
    with ops.use_implementation("reference"):
        ops.permute_tokens(*args)
        with ops.use_implementation("cpu"):
            ops.permute_tokens(*args)
        ops.permute_tokens(*args)
    ops.permute_tokens(*args)
    assert calls == ["cpu", "reference", "cpu", "reference", "cpu"]


def test_an_explicit_request_never_falls_back() -> None:
    with pytest.raises(ValueError, match=r"name is 'tirton'; valid: cpu, reference"), ops.use_implementation("tirton"):
        pass
    with (
        ops.use_implementation("cpu"),
        pytest.raises(ValueError, match=r"'cpu' was requested for tensors on cuda; valid for it: cpu"),
    ):
        ops.implementation_for(torch.device("cuda"))


def test_a_device_without_implementation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no implementation for device 'xla'; valid: cpu, cuda"):
        ops.implementation_for(torch.device("xla"))


def test_a_compiler_sees_each_op_as_one_opaque_node() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if "svg2" in str(node.target))
        return graph.forward

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_pipeline(q, k, v, num_q_clusters=2, num_k_clusters=5)[0] * 2

    inputs = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0, atol=0)
    counts = {name: sum(f"svg2.{name}" in target for target in seen) for name in SCHEMAS}
    assert counts["kmeans"] == counts["cluster_order"] == 2
    assert counts["permute_tokens"] == 2
    assert counts["block_sparse_attention"] == counts["select_blocks"] == 1


def test_fakes_keep_symbolic_sizes_without_guards() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_pipeline(q, k, v, num_q_clusters=2, num_k_clusters=5)[0]

    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for num_tokens in (40, 57, 96):
        inputs = [torch.randn(1, 2, num_tokens, 8) for _ in range(3)]
        assert compiled(*inputs).shape == inputs[0].shape
    assert counter.frame_count == 1


# --------------------------------------------------------------------------------------- the rewritten attention, whole


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    layout=st.tuples(st.integers(0, 9), st.integers(12, 120), st.integers(0, 9)),
    clusters=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    head_dim=st.integers(1, 24),
    masked=st.booleans(),
    compensation=st.booleans(),
    by_error=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    implementation=st.sampled_from(["cpu", "reference"]),
)
def test_identity_when_every_cluster_is_kept(
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    layout: tuple[int, int, int],
    clusters: tuple[int, int],
    head_dim: int,
    masked: bool,
    compensation: bool,
    by_error: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    torch.manual_seed(seed)
    before, video, after = layout
    num_tokens = before + video + after
    q = torch.randn(batch, kv_heads * group, num_tokens, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, num_tokens, head_dim).to(dtype) for _ in range(2))
    valid = torch.rand(batch, 1, num_tokens) < 0.8 if masked else None
    if valid is not None:
        valid[..., 0] = True
    with ops.use_implementation(implementation):
        check_identity(
            *(q, k, v, valid),
            num_q_clusters=clusters[0],
            num_k_clusters=clusters[1],
            video=(before, before + video),
            compensation=compensation,
            by_error=by_error,
        )


def test_less_density_means_more_error_and_compensation_less() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1, 2, 12, 16, generator=generator)
    topic = torch.randint(0, 12, (400,), generator=generator)
    q, k, v = (1.5 * centers[:, :, topic] + torch.randn(1, 2, 400, 16, generator=generator) / 2 for _ in range(3))
    exact = masked_dense(q, k, v, None)

    def error(density: float, compensation: bool, by_error: bool) -> float:
        out, _ = attention_pipeline(
            q,
            k,
            v,
            num_q_clusters=8,
            num_k_clusters=24,
            iters=5,
            density=density,
            compensation=compensation,
            by_error=by_error,
        )
        return float((out - exact).square().mean())

    plain = [error(density, False, False) for density in (0.1, 0.25, 0.5, 1.0)]
    assert plain == sorted(plain, reverse=True)
    assert plain[-1] < 1e-10
    for density in (0.1, 0.25):
        compensated, routed = error(density, True, False), error(density, True, True)
        assert compensated < error(density, False, False)
        assert routed < compensated


def test_nan_in_a_query_or_key_shows_as_in_dense_attention() -> None:
    for broken_query in (True, False):
        q, k, v = (torch.randn(1, 1, 60, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        (q if broken_query else k)[0, 0, 11, 3] = float("nan")
        out, _ = attention_pipeline(q, k, v, num_q_clusters=3, num_k_clusters=6, top_p=0.3)
        assert torch.equal(out.isnan(), masked_dense(q, k, v, None).isnan())
