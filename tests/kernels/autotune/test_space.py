"""The search space holds what the defaults are."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels.autotune import space
from svg2_compile.kernels.tuning.defaults import default_config, imagined_capability
from tests.kernels.tuning_support import CPU


def test_every_default_is_a_candidate() -> None:
    """The search begins at the default; its parameters are those of the space."""
    for kernel in space.SPACES:
        device = CPU if kernel in space.CPU_KERNELS else torch.device("cuda")
        with imagined_capability(90):
            default = dict(default_config(kernel, device, "bfloat16", 128))
        assert default in space.candidates(kernel)
    with pytest.raises(ValueError, match="kernel is 'nope'; valid: attention"):
        space.candidates("nope")
