"""The Triton kernels on a CUDA device. Everything here is marked ``gpu`` and skipped where there is none.

    pytest tests/gpu -n 8 -m "not slow"        on a GPU (-n of pytest-xdist: compiling kernels is what takes time)
    pytest tests/gpu -m slow                   tensors of more than 2^31 elements, 40 GiB: one at a time
    TRITON_INTERPRET=1 pytest tests/gpu        a rehearsal of the same tests on the CPU, with small sizes

Tests that take the fixture ``cuda`` need the real thing (graphs, streams, the memory of the device) and are skipped in
a rehearsal, too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
REHEARSAL = not HAS_CUDA and os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent

# Triton is on PyPI for Linux only.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
if REHEARSAL:
    from tests.interpreter import bfloat16

    bfloat16.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents or REHEARSAL:
            continue
        item.add_marker("gpu")
        if not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (TRITON_INTERPRET=1 rehearses on the CPU)"))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the kernels run: the GPU, or, in a rehearsal, the CPU with Triton's interpreter."""
    from svg2_compile.kernels import ops

    found = torch.device("cuda" if HAS_CUDA else "cpu")
    with ops.use_implementation("triton"):
        yield found


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """As ``device``, for what no interpreter can show."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device, not only the interpreter")
    return device
