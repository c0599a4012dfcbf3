"""The search itself, on the CPU kernels; what is sorted out for a GPU, without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.autotune import search, space
from svg2_compile.kernels.autotune.search import Progress, default_workloads, describe, tune
from svg2_compile.kernels.autotune.workloads import Workload
from svg2_compile.kernels.tuning.lookup import tuned
from svg2_compile.kernels.tuning.tables import Table, load_table, merge
from tests.kernels.tuning_support import CPU, ENGINE, SMALL, machine_name


def test_a_search_tries_the_space_and_remembers(folder: Path) -> None:
    told: list[Progress] = []
    (outcome,) = tune([SMALL], CPU, budget_s=60, tell=told.append)
    assert outcome.measurement.complete
    assert len(told) == len(space.candidates("cpu_kmeans")) == told[-1].done
    stored = load_table(machine_name(), folder)
    assert stored is not None and stored.measurements[SMALL.key] == outcome.measurement
    assert outcome.measurement.best_ms == min(ms for ms in outcome.measurement.trials.values() if ms is not None)
    assert outcome.measurement.best_ms <= outcome.measurement.default_ms
    chosen = tuned("cpu_kmeans", CPU, torch.float32, 16, 600)
    assert describe(chosen) in outcome.measurement.trials and dict(chosen) == dict(outcome.measurement.config)


def test_a_search_without_time_times_the_default_and_is_resumed() -> None:
    (first,) = tune([SMALL], CPU, budget_s=0)
    assert not first.measurement.complete and len(first.measurement.trials) == 1
    told: list[Progress] = []
    (second,) = tune([SMALL], CPU, budget_s=60, tell=told.append)
    assert second.measurement.complete
    partial = dataclasses.replace(second.measurement, trials={"SCORES_PER_TILE=131072": 0.5}, complete=False)
    merge(Table(machine_name(), ENGINE, {SMALL.key: partial}))
    told.clear()
    (third,) = tune([SMALL], CPU, budget_s=60, tell=told.append)
    assert [progress.note for progress in told].count("known") == 1
    assert third.measurement.trials["SCORES_PER_TILE=131072"] == 0.5


def test_a_wrong_result_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Workload.call

    def broken(self: Workload, device: torch.device, *args: object, **kwargs: object):
        call = real(self, device)

        def run() -> torch.Tensor:
            tile = tuned(self.kernel, device, self.dtype, self.head_dim, self.num_tokens)["SCORES_PER_TILE"]
            return call() + (1.0 if tile == 1 << 17 else 0.0)

        return run

    monkeypatch.setattr(Workload, "call", broken)
    told: list[Progress] = []
    (outcome,) = tune([SMALL], CPU, budget_s=60, tell=told.append)
    assert outcome.measurement.trials["SCORES_PER_TILE=131072"] is None
    assert any("result differs by" in progress.note for progress in told)


@pytest.mark.parametrize("kernel", space.CPU_KERNELS)
def test_every_cpu_kernel_can_be_tuned(kernel: str) -> None:
    (outcome,) = tune([Workload(kernel, torch.float32, 16, 700, 1)], CPU, budget_s=30)
    assert outcome.measurement.complete


def test_workloads_follow_the_device() -> None:
    kernels = {workload.kernel for workload in default_workloads(CPU, torch.float32, 64, 4096, 2)}
    assert kernels == set(space.CPU_KERNELS)
    on_gpu = default_workloads(torch.device("cuda"), torch.bfloat16, 128, 75_600, 40)
    assert {workload.kernel for workload in on_gpu} == set(space.GPU_KERNELS)
    assert {workload.density for workload in on_gpu if workload.kernel == "attention"} == {0.25, 0.10}


def test_gpu_candidates_are_pruned_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(search, "capability_of", lambda device: 90)
    workload = Workload("attention", torch.bfloat16, 128, 8192, 2)
    too_large = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "PROGRAMS_PER_SM": 1}
    assert "shared memory" in str(search._resource_problem(workload, too_large, torch.device("cuda")))
    default = {**too_large, "num_stages": 2}
    assert search._resource_problem(workload, default, torch.device("cuda")) is None
