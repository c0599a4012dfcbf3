"""The ops as a compiler and a user meet them: schemas, fakes, dispatch, opacity."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import dispatch, ops
from tests.kernels.helpers import attention_pipeline, sample_arguments

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
    "cluster_variances": "(Tensor x, Tensor order, Tensor offsets, Tensor centroids) -> Tensor",
    "farthest_members": "(Tensor x, Tensor order, Tensor offsets, Tensor centroids, SymInt count) -> Tensor",
    "block_estimates": "(Tensor key, Tensor value, Tensor k_offsets, Tensor q_centroids, Tensor k_centroids,"
    " Tensor v_centroids, float scale) -> (Tensor, Tensor)",
    "first_order_estimates": "(Tensor key, Tensor value, Tensor k_offsets, Tensor q_centroids, Tensor k_centroids,"
    " Tensor v_centroids, float scale) -> (Tensor, Tensor, Tensor)",
    "select_blocks_of_layer": "(Tensor log_mass, Tensor log_error, Tensor q_variances, Tensor k_centroids,"
    " Tensor q_sizes, Tensor k_offsets, float scale, Tensor density, Tensor? far_members=None) -> Tensor",
    "first_order_terms": "(Tensor key, Tensor value, Tensor k_offsets, Tensor q_centroids, Tensor k_centroids,"
    " Tensor v_centroids, Tensor log_mass, Tensor block_map, float scale, Tensor? residual_of_all=None)"
    " -> (Tensor, Tensor)",
    "first_order_attention": "(Tensor query, Tensor key, Tensor value, Tensor q_offsets, Tensor k_offsets,"
    " Tensor block_map, float scale, Tensor q_centroids, Tensor k_centroids, Tensor v_centroids, Tensor log_mass,"
    " Tensor residual, Tensor slope, Tensor? q_order=None, Tensor? k_order=None, SymInt workspace_mb=256)"
    " -> (Tensor, Tensor)",
    "sampled_error": "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor q_order, Tensor q_offsets,"
    " Tensor k_offsets, float scale, SymInt rows) -> (Tensor, Tensor)",
    "block_density": "(Tensor q_offsets, Tensor k_offsets, Tensor block_map) -> Tensor",
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


@pytest.mark.parametrize("implementation", ["cpu", "native", "reference"])
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
        "name = ops.implementation_for(torch.device('cpu'))\n"
        "assert name in ('native', 'cpu')\n"
        "folder = 'cpu.native' if name == 'native' else 'cpu'\n"
        "assert f'svg2_compile.kernels.{folder}.implementation' in sys.modules\n"
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


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
def test_every_implementation_has_every_op_with_its_signature(implementation: str) -> None:
    module = importlib.import_module(dispatch.IMPLEMENTATIONS[implementation].module)
    assert [name for name in SCHEMAS if not callable(getattr(module, name, None))] == []
    for name in SCHEMAS:
        signature = inspect.signature(getattr(module, name))
        # What only this implementation knows, such as compute_dtype, can be given by keyword alone.
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert signature.replace(parameters=parameters) == inspect.signature(getattr(ops, name))


def test_an_op_takes_keywords_and_has_the_documentation_of_its_signature() -> None:
    x, order = ARGUMENTS["permute_tokens"][0]
    assert torch.equal(ops.permute_tokens(order=order, x=x), ops.permute_tokens(x, order))
    labels = ARGUMENTS["cluster_order"][0][0]
    by_keyword = ops.cluster_order(labels, num_clusters=4, start=0, num_tokens=50, valid=None)
    assert all(torch.equal(a, b) for a, b in zip(by_keyword, ops.cluster_order(labels, 4, 0, 50), strict=True))
    assert str(ops.permute_tokens.__doc__).startswith("Row r of the result is token order[r]")


def test_an_explicit_request_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg2_compile.kernels.reference import implementation as reference

    default = ops.implementation_for(torch.device("cpu"))
    cpu = importlib.import_module(dispatch.IMPLEMENTATIONS[default].module)
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
        with ops.use_implementation(default):
            ops.permute_tokens(*args)
        ops.permute_tokens(*args)
    ops.permute_tokens(*args)
    assert calls == ["cpu", "reference", "cpu", "reference", "cpu"]


def test_an_explicit_request_never_falls_back() -> None:
    names = r"name is 'tirton'; valid: cpu, native, reference"
    with pytest.raises(ValueError, match=names), ops.use_implementation("tirton"):
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
