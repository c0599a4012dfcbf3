"""What the kernels take on real targets, found by compiling alone: no GPU is needed, and none is used.

The gates are those that decide whether a kernel can be fast at all: it fits, its inner loops keep everything in
registers, use the tensor cores and load asynchronously.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is on PyPI for Linux only")

from svg2_compile.kernels.autotune.search import rehearsed_launch
from svg2_compile.kernels.autotune.workloads import Workload
from svg2_compile.kernels.triton import implementation
from svg2_compile.kernels.triton.rehearsal import (
    TARGETS,
    Launch,
    compile_launch,
    record_launches,
    resource_problem,
)
from svg2_compile.kernels.tuning.defaults import default_config, imagined_capability

CUDA = torch.device("cuda")
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


def launch_for(kernel: str, dtype: torch.dtype, head_dim: int, target: str):
    """The launch of the default configuration, at the sizes of Wan 2.1 1.3B."""
    workload = Workload(kernel, dtype, head_dim, 32_760, 12)
    capability = CAPABILITIES.get(target, 0)
    with imagined_capability(capability):
        config = default_config(kernel, CUDA, workload.key.dtype, workload.key.head_dim)
    return rehearsed_launch(workload, config, capability)


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kernel", ["attention", "kmeans_assign"])
def test_default_configurations_keep_their_inner_loops_in_registers(kernel: str, head_dim: int, target: str) -> None:
    resources = compile_launch(launch_for(kernel, torch.bfloat16, head_dim, target), TARGETS[target])
    assert resource_problem(resources, TARGETS[target]) is None
    assert resources.matrix_instructions > 0
    assert resources.async_copies > 0


@pytest.mark.parametrize("kernel", ["attention", "kmeans_assign"])
def test_hopper_uses_its_asynchronous_tensor_cores(kernel: str) -> None:
    resources = compile_launch(launch_for(kernel, torch.bfloat16, 128, "sm_90"), TARGETS["sm_90"])
    assert resources.warpgroup_instructions == resources.matrix_instructions > 0
    assert not resources.warnings


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["attention", "kmeans_assign"])
def test_float32_fits_as_well(kernel: str, head_dim: int, target: str) -> None:
    resources = compile_launch(launch_for(kernel, torch.float32, head_dim, target), TARGETS[target])
    assert resource_problem(resources, TARGETS[target]) is None


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("kernel", ["attention", "kmeans_assign"])
def test_amd_compiles(kernel: str, head_dim: int) -> None:
    resources = compile_launch(launch_for(kernel, torch.bfloat16, head_dim, "gfx942"), TARGETS["gfx942"])
    assert resources.matrix_instructions > 0
    assert resource_problem(resources, TARGETS["gfx942"]) is None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(1, 2, *shape, dtype=dtype, device="cuda")


def first_order_launches(dtype: torch.dtype, head_dim: int, target: str, op: str) -> dict[str, Launch]:
    """The launches of one of the operators of first-order compensation, by kernel."""
    with record_launches(CAPABILITIES.get(target, 0)) as (_, launches):
        tokens, offsets = empty(1000, head_dim, dtype=dtype), empty(103, dtype=torch.int32)
        q_offsets, block_map = empty(73, dtype=torch.int32), empty(72, 102, dtype=torch.bool)
        queries, keys, log_mass = empty(70, head_dim), empty(100, head_dim), empty(70, 102)
        clustered = (queries, keys, keys)
        if op == "block_estimates":
            implementation.block_estimates(tokens, tokens, offsets, *clustered, 0.1)
        elif op == "sampled_error":
            order = empty(1000, dtype=torch.int32)
            implementation.sampled_error(tokens, tokens, tokens, tokens, order, q_offsets, offsets, 0.1, 32)
        elif op == "first_order_terms":
            implementation.first_order_terms(tokens, tokens, offsets, *clustered, log_mass, block_map, 0.1)
        else:
            terms = (log_mass, queries, empty(head_dim, head_dim))
            blocks = (q_offsets, offsets, block_map, 0.1)
            implementation.first_order_attention(tokens, tokens, tokens, *blocks, *clustered, *terms)
    return {launch.name: launch for launch in launches}


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["block_estimates", "first_order_terms", "sampled_error"])
def test_estimates_and_terms_stay_in_registers_and_fit_small_gpus(
    op: str, dtype: torch.dtype, head_dim: int, target: str
) -> None:
    kernels = {
        "block_estimates": ["_log_errors"],
        "first_order_terms": ["_residuals", "_slopes"],
        "sampled_error": ["_exact_rows"],
    }[op]
    launches = first_order_launches(dtype, head_dim, target, op)
    for kernel in kernels:
        resources = compile_launch(launches[kernel], TARGETS[target])
        assert resource_problem(resources, TARGETS[target]) is None
        assert (resources.loop_spills or 0) == 0
        assert resources.shared_bytes <= 99 * 1024  # sm_86 and sm_89
        assert (resources.matrix_instructions > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])  # at 256 the loop over means spills, with centroids as well
def test_first_order_attention_keeps_the_inner_loops_of_attention(head_dim: int, target: str) -> None:
    launch = first_order_launches(torch.bfloat16, head_dim, target, "first_order_attention")["attend"]
    resources = compile_launch(launch, TARGETS[target])
    assert resource_problem(resources, TARGETS[target]) is None
    assert resources.async_copies > 0
    if target == "sm_90":
        assert resources.warpgroup_instructions == resources.matrix_instructions > 0
        assert not resources.warnings


def test_a_configuration_that_cannot_work_is_told_apart() -> None:
    workload = Workload("attention", torch.bfloat16, 128, 32_760, 12)
    config = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4, "PROGRAMS_PER_SM": 1}
    resources = compile_launch(rehearsed_launch(workload, config, 90), TARGETS["sm_90"])
    assert "bytes of shared memory" in str(resource_problem(resources, TARGETS["sm_90"]))
    crowded = {**config, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    resources = compile_launch(rehearsed_launch(workload, crowded, 90), TARGETS["sm_90"])
    assert resource_problem(resources, TARGETS["sm_90"]) is not None
