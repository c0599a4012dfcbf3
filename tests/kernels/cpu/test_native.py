"""The native library: how it is built, what runs without it, and that its results do not depend on the threads."""

from __future__ import annotations

import ctypes
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svg2_compile.kernels import ops
from svg2_compile.kernels.cpu.native import build, calls
from svg2_compile.kernels.cpu.native import implementation as native_ops
from svg2_compile.kernels.reference import implementation as reference
from tests.kernels.helpers import FirstOrder, make_problem, sample_arguments

CPU = torch.device("cpu")
NEEDS_NATIVE = pytest.mark.skipif(build.native().library is None, reason=f"no native code: {build.native().detail}")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As in a process that has not asked for native code yet."""
    build.native.cache_clear()
    yield
    build.native.cache_clear()


ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'


def tiny_source(folder: Path, text: str = ANSWER) -> dict[Path, bytes]:
    file = folder / "tiny.cpp"
    file.write_text(text)
    return build.sources(folder)


@NEEDS_NATIVE
def test_what_is_compiled_once_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, compiler = tmp_path / "cache", build.find_compiler()
    path = build.built(compiler, tiny_source(tmp_path), cache)
    assert ctypes.CDLL(str(path)).answer() == 42
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("it is compiled again"))
    assert build.built(compiler, tiny_source(tmp_path), cache) == path


@NEEDS_NATIVE
def test_other_sources_and_flags_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    monkeypatch.setattr(build, "_compile", lambda compiler, files, path: path.touch())
    first = build.built(compiler, tiny_source(tmp_path), tmp_path / "cache")
    other_text = build.built(compiler, tiny_source(tmp_path, "int other;"), tmp_path / "cache")
    monkeypatch.setenv("SVG2_NATIVE_FLAGS", "-g")
    other_flags = build.built(compiler, tiny_source(tmp_path, "int other;"), tmp_path / "cache")
    assert len({first, other_text, other_flags}) == 3


@NEEDS_NATIVE
def test_two_processes_at_once_build_one_library(tmp_path: Path) -> None:
    tiny_source(tmp_path)
    code = (
        "import sys, ctypes; from pathlib import Path\n"
        "from svg2_compile.kernels.cpu.native import build\n"
        "folder = Path(sys.argv[1])\n"
        "path = build.built(build.find_compiler(), build.sources(folder), folder / 'cache')\n"
        "assert ctypes.CDLL(str(path)).answer() == 42\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir()) if path.suffix != ".lock"] == [".so"]


@NEEDS_NATIVE
def test_what_does_not_compile_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(build.NotBuilt, match=r"does not compile them: .*error"):
        build.built(build.find_compiler(), tiny_source(tmp_path, "no code at all"), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_aten_runs_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler() -> str:
        raise build.NotBuilt("no C++ compiler was found")

    monkeypatch.setattr(build, "find_compiler", no_compiler)
    args = sample_arguments()["block_sparse_attention"][0]
    with caplog.at_level(logging.WARNING, "svg2_compile"):
        assert ops.implementation_for(CPU) == "cpu"
        out, _ = ops.block_sparse_attention(*args)
        ops.block_sparse_attention(*args)
    torch.testing.assert_close(out, reference.block_sparse_attention(*args)[0])
    assert [record.getMessage() for record in caplog.records if "native" in record.getMessage()] == [
        "CPU kernels run without native code, which is slower: no C++ compiler was found (SVG2_NATIVE=0 says nothing)"
    ]
    with ops.use_implementation("native"), pytest.raises(ValueError, match=r"'native' was requested, but there is no"):
        ops.implementation_for(CPU)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_it_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SVG2_NATIVE", value)
    assert ops.implementation_for(CPU) == "cpu"
    assert build.native().detail == "switched off by SVG2_NATIVE"
    assert caplog.records == []


def elementary(name: str, x: Tensor) -> Tensor:
    library = build.native().library
    assert library is not None
    x = torch.nn.functional.pad(x, (0, -x.shape[0] % 16)).contiguous()
    getattr(library, f"svg2_{name}")(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[0]))
    return x


@NEEDS_NATIVE
def test_native_exponential_keeps_its_stated_error() -> None:
    x = torch.cat([torch.linspace(-126.0, 127.0, 1 << 20), torch.linspace(-1.0, 1.0, 1 << 20)])
    error = (elementary("exp2", x).double() / torch.exp2(x.double()) - 1).abs().max()
    assert float(error) < 2e-7
    special = elementary("exp2", torch.tensor([0.0, -math.inf, -1000.0, -127.0, math.nan]))[:5]
    assert special[:4].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert bool(special[4].isnan())


@NEEDS_NATIVE
def test_native_logarithm() -> None:
    x = torch.cat([torch.logspace(-37.9, 38.5, 1 << 20), torch.linspace(0.5, 2.0, 1 << 20)])
    error = (elementary("log", x).double() - x.double().log()).abs()
    assert float((error / x.double().log().abs().clamp(min=1.0)).max()) < 3e-7
    special = elementary("log", torch.tensor([0.0, math.inf, math.nan, -1.0, 1e-42]))[:5]
    assert special[:2].tolist() == [-math.inf, math.inf]
    assert bool(special[2:4].isnan().all())
    assert float(special[4]) == pytest.approx(math.log(1e-42), rel=1e-3)


def large_arguments() -> dict[str, tuple[Any, ...]]:
    """Of a problem with work for many threads."""
    problem = make_problem(
        q_heads=4, kv_heads=2, num_queries=900, num_keys=1100, head_dim=24, num_q_clusters=9, num_k_clusters=40
    )
    case = FirstOrder.of(problem)
    labels, _, _ = ops.kmeans(problem.query, torch.zeros(1, 4, 9, 24), torch.tensor(False), 2)
    order, offsets = ops.cluster_order(labels, 9, 0, 900)
    return {
        "kmeans": (problem.query, torch.zeros(1, 4, 9, 24), torch.tensor(False), 3),
        "cluster_order": (labels, 9, 0, 900),
        "permute_tokens": (problem.query, order),
        "unpermute_tokens": (problem.query, order),
        "cluster_means": (problem.query, offsets),
        "cluster_variances": (problem.query, order, offsets, case.q_centroids),
        "farthest_members": (problem.query, order, offsets, case.q_centroids, 5),
        "first_order_estimates": case.estimate_args,
        "select_blocks_of_layer": case.select_args(0.3),
        "first_order_terms": (*case.term_args, case.residual_of_all),
        "block_sparse_attention": problem.args(True),
        "first_order_attention": case.attention_args,
    }


@NEEDS_NATIVE
def test_native_results_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "OPERATIONS_PER_THREAD", 1)  # so that small ops, too, take all of them
    before, arguments = torch.get_num_threads(), large_arguments()
    results: dict[int, dict[str, Any]] = {}
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            results[threads] = {name: getattr(native_ops, name)(*args) for name, args in arguments.items()}
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5, 16):
        torch.testing.assert_close(results[threads], results[1], rtol=0, atol=0, equal_nan=True)


@NEEDS_NATIVE
def test_what_selected_clusters_leave_out_is_taken_off_where_that_is_known_and_safe() -> None:
    """Of all queries that skip at least a 64th of their mass and more than half of the keys; of others, nothing is
    believed of what is said about all clusters."""
    case = FirstOrder.of(make_problem(num_queries=200, num_keys=900, num_q_clusters=20, num_k_clusters=30, keep=0.3))
    block_map, k_sizes = case.problem.block_map[..., :20, :30], case.problem.k_offsets.diff(dim=-1)[..., None, :30]
    case.log_mass[0, 0, 0, :30].masked_fill_(~block_map[0, 0, 0], -20.0)  # skips next to nothing of its mass
    mass = case.log_mass[..., :30]
    skipped = mass.masked_fill(block_map, -math.inf).logsumexp(-1) - mass.logsumexp(-1)
    mostly = (k_sizes * ~block_map).sum(-1) > (k_sizes * block_map).sum(-1)
    taken_off = mostly & (skipped >= -math.log(64))
    assert bool(taken_off.any()) and not bool(taken_off.all()) and not bool(taken_off[0, 0, 0])
    direct, _ = native_ops.first_order_terms(*case.term_args)
    raised, _ = native_ops.first_order_terms(*(*case.term_args, case.residual_of_all + 1))
    by = torch.where(taken_off, torch.exp(-skipped), 0.0).unsqueeze(-1)
    torch.testing.assert_close(raised, direct + by, rtol=1e-4, atol=1e-4)
    unknown, _ = native_ops.first_order_terms(*(*case.term_args, torch.full_like(direct, math.nan)))
    torch.testing.assert_close(unknown, direct, rtol=0, atol=0)


@NEEDS_NATIVE
@pytest.mark.parametrize("name", ["permute_tokens", "unpermute_tokens"])
def test_native_order_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"order lies in \[0, 9\]; valid: \[0, 3\)"):
        getattr(native_ops, name)(torch.zeros(1, 1, 3, 2), torch.tensor([[[0, 1, 9]]], dtype=torch.int32))


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9])
def test_scores_of_any_size_have_weights(magnitude):
    """The largest score of a row and its shift are rounded apart: that must not become a power of two of its own."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (magnitude * torch.randn(1, 2, 160, 16, generator=generator) for _ in range(3))
    offsets = torch.tensor([0, 40, 80, 120, 150, 160, 160, 160], dtype=torch.int32).expand(1, 2, -1).contiguous()
    every = torch.ones(1, 2, 7, 7, dtype=torch.bool)
    with ops.use_implementation("native"):
        out, _ = torch.ops.svg2.block_sparse_attention(query, key, value, offsets, offsets, every, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.25)
    torch.testing.assert_close(out / magnitude, expected / magnitude)
