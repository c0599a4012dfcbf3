"""What all tests share: no network, no GPU tests without a GPU, no compiled code that outlives its test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before diffusers is imported: models are built from configurations, nothing is to be fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# In processes side by side (pytest -n auto) each has its share of the cores: more threads would wait for each other.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo's caches are per process: without this, recompile limits of one test would reach the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _no_tuning_of_this_machine(tmp_path_factory):
    """Tests run with default tile sizes, whatever was tuned here; native code that is compiled already stays so."""
    from svg2_compile.kernels.cpu.native.build import cache_dir

    compiled, folder = cache_dir(), tmp_path_factory.mktemp("cache")
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / "native").symlink_to(compiled, target_is_directory=True)
    os.environ["SVG2_CACHE_DIR"] = str(folder)
    yield
    del os.environ["SVG2_CACHE_DIR"]
