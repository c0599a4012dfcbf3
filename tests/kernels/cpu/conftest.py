"""The CPU tests run over both implementations: ATen calls, and native code where a compiler is there to make it."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from svg2_compile.kernels.cpu.native.build import native
from svg2_compile.kernels.dispatch import IMPLEMENTATIONS


@pytest.fixture(params=["cpu", "native"])
def cpu(request: pytest.FixtureRequest) -> ModuleType:
    """The module with the functions of one implementation."""
    if request.param == "native" and native().library is None:
        pytest.skip(f"no native code: {native().detail}")
    return importlib.import_module(IMPLEMENTATIONS[request.param].module)
