"""These tests run the Triton kernels on CPU tensors. Triton decides at import whether it interprets, so they need a
process of their own: TRITON_INTERPRET=1 pytest tests/interpreter. tests/kernels/test_triton_interpreted.py starts
it."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.interpreter import bfloat16

    bfloat16.install()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """What a kernel does not write must show: new tensors hold NaN, or the largest integer."""
    import torch

    def poisoned(original):
        def new_empty(self, *size, **kwargs):
            tensor = original(self, *size, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return new_empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
