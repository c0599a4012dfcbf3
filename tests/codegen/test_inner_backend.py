"""The choice of the inner backend, and compiling with it."""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from svg2_compile.codegen import inner_backend
from svg2_compile.codegen.inner_backend import (
    compile_inner,
    default_inner_backend,
    inductor_problem,
    resolve_inner_backend,
)
from svg2_compile.logs.logger import Once


@pytest.fixture(autouse=True)
def _forget_machine() -> Iterator[None]:
    inductor_problem.cache_clear()
    yield
    inductor_problem.cache_clear()


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """Inductor is told to look for a compiler that does not exist."""
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_says_once_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    once = Once()
    with caplog.at_level(logging.WARNING, logger="svg2_compile"):
        assert default_inner_backend("cpu", once) == "eager"
        assert default_inner_backend("cpu", once) == "eager"
    assert len(caplog.records) == 1
    assert "no C++ compiler found" in caplog.text
    assert "g++" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_only_inductor_is_replaced() -> None:
    assert resolve_inner_backend("inductor", "cpu", once=Once()) == "eager"
    assert resolve_inner_backend("aot_eager", "cpu") == "aot_eager"
    with pytest.raises(RuntimeError, match="strict=True: no C\\+\\+ compiler"):
        resolve_inner_backend("inductor", "cpu", strict=True)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_graphs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_backend, "_said_in_process", Once())
    module = torch.nn.Linear(4, 4)
    compiled = torch.compile(module, backend=lambda gm, inputs: compile_inner(gm, inputs, "inductor", "max-autotune"))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def test_missing_python_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    problem = inductor_problem("cpu")
    assert problem is not None
    assert "Python.h" in problem
    (tmp_path / "Python.h").touch()
    inductor_problem.cache_clear()
    assert inductor_problem("cpu") is None


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: False)
    problem = inductor_problem("cuda")
    assert problem is not None
    assert "Triton is not installed" in problem


def test_unknown_devices_are_left_to_inductor() -> None:
    assert inductor_problem("mps") is None


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_named_backends(name: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU())
    compiled = torch.compile(module, backend=lambda gm, inputs: compile_inner(gm, inputs, name))
    x = torch.randn(3, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_a_mode_reaches_inductor_as_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: Any = None) -> fx.GraphModule:
        seen.append(config_patches)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(inner_backend, "inductor_problem", lambda device_type: None)
    gm = fx.symbolic_trace(torch.nn.ReLU())
    compile_inner(gm, [torch.ones(2)], "inductor")
    compile_inner(gm, [torch.ones(2)], "inductor", "max-autotune-no-cudagraphs")
    assert seen[0] is None
    assert seen[1]["max_autotune"] is True


def test_bad_names() -> None:
    gm = fx.symbolic_trace(torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"inner_backend='nope'.*eager"):
        compile_inner(gm, [torch.ones(2)], "nope")
    with pytest.raises(ValueError, match="names this compiler itself"):
        compile_inner(gm, [torch.ones(2)], "svg2")
