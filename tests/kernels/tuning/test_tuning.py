"""Tuning tables: lookup, files, damage, two writers at once; and the search itself on the CPU kernels."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.tuning import lookup as tuning
from svg2_compile.kernels.tuning import search as autotune
from svg2_compile.kernels.tuning import space as search_space
from svg2_compile.kernels.tuning import tables as tuning_tables
from svg2_compile.kernels.tuning.defaults import default_config, imagined_capability
from svg2_compile.kernels.tuning.lookup import forget_tables, nearest, override, tuned
from svg2_compile.kernels.tuning.search import Progress, default_workloads, describe, tune
from svg2_compile.kernels.tuning.tables import Measurement, Table, TuningKey, load_table, merge, read_table, table_name
from svg2_compile.kernels.tuning.workloads import Workload

CPU = torch.device("cpu")
NAME = tuning.device_name(CPU)
ENGINE = tuning_tables.engine_of(NAME)
SMALL = Workload("cpu_kmeans", torch.float32, 16, 600, 1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SVG2_CACHE_DIR", str(tmp_path))
    forget_tables()
    yield tuning_tables.cache_dir()
    forget_tables()


def measured(scores: int, complete: bool = True) -> Measurement:
    return Measurement({"SCORES_PER_TILE": scores}, 1.0, 2.0, {f"SCORES_PER_TILE={scores}": 1.0}, complete)


def write(folder: Path, measurements: dict[TuningKey, Measurement]) -> Path:
    return merge(Table(NAME, ENGINE, measurements), folder)


def test_keys_are_buckets() -> None:
    key = TuningKey.of("attention", torch.bfloat16, 80, 75_600, 0.295)
    assert key == TuningKey("attention", "bfloat16", 128, 65_536, 25)
    assert TuningKey.of("attention", torch.bfloat16, 128, 131_071, 0.129).density == 10
    assert TuningKey.of("attention", torch.bfloat16, 8, 1, 0.25) == TuningKey("attention", "bfloat16", 16, 1, 25)


def test_without_a_table_the_default_is_used_and_gpus_get_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    assert tuned("cpu_kmeans", CPU, torch.float32, 64, 4096) == default_config("cpu_kmeans", CPU, "float32", 64)
    cuda = torch.device("cuda")
    with caplog.at_level(logging.INFO, logger="svg2_compile.kernels"), imagined_capability(90):
        for _ in range(2):
            assert tuned("attention", cuda, torch.bfloat16, 128, 75_600)["BLOCK_M"] == 128
    assert [record.message.count("svg2 tune") for record in caplog.records] == [1]


def test_a_table_is_used_by_the_next_process_and_by_the_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {SMALL.key: measured(4096)})
    forget_tables()
    assert tuned("cpu_kmeans", CPU, torch.float32, 16, 600)["SCORES_PER_TILE"] == 4096
    code = (
        "import torch; from svg2_compile.kernels.tuning.lookup import tuned; torch.set_num_threads(%d)\n"
        "print(tuned('cpu_kmeans', torch.device('cpu'), torch.float32, 16, 600)['SCORES_PER_TILE'])"
    )
    command = [sys.executable, "-c", code % torch.get_num_threads()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "4096"


def test_the_nearest_measurement_counts() -> None:
    def key(tokens: int, density: int = 25, head_dim: int = 64) -> TuningKey:
        return TuningKey("cpu_kmeans", "float32", head_dim, tokens, density)

    configs = {key(1024): {"a": 1}, key(65_536): {"a": 2}, key(65_536, 10): {"a": 3}, key(2048, 25, 128): {"a": 4}}
    assert nearest(key(2048), configs) == {"a": 1}
    assert nearest(key(32_768), configs) == {"a": 2}
    assert nearest(key(32_768, 10), configs) == {"a": 3}
    assert nearest(key(2048, 25, 32), configs) is None


def test_a_table_for_other_parameters_is_ignored(folder: Path) -> None:
    odd = Measurement({"SOMETHING_ELSE": 3}, 1.0, 1.0, {}, True)
    write(folder, {SMALL.key: odd})
    forget_tables()
    assert tuned("cpu_kmeans", CPU, torch.float32, 16, 600) == default_config("cpu_kmeans", CPU, "float32", 16)


def test_an_override_wins_and_ends() -> None:
    before = tuned("cpu_kmeans", CPU, torch.float32, 16, 600)
    with override("cpu_kmeans", {"SCORES_PER_TILE": 7}):
        assert tuned("cpu_kmeans", CPU, torch.float32, 16, 600) == {"SCORES_PER_TILE": 7}
    assert tuned("cpu_kmeans", CPU, torch.float32, 16, 600) == before


def test_a_table_survives_its_file(folder: Path) -> None:
    path = write(folder, {SMALL.key: measured(4096, complete=False)})
    table = read_table(path)
    assert (table.device, table.engine) == (NAME, ENGINE)
    assert table.measurements == {SMALL.key: measured(4096, complete=False)}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99}',
        '{"format": 1, "device": "x"}',
        '{"format": 1, "device": "x", "engine": "y", "entries": [{}]}',
        '{"format": 1, "device": 3, "engine": "y", "entries": []}',
        '{"format": 1, "device": "x", "engine": "y", "entries": 7}',
    ],
)
def test_a_corrupt_table_is_reported_ignored_and_kept_aside(
    folder: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / table_name(NAME, ENGINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="svg2_compile.kernels"):
        assert tuned("cpu_kmeans", CPU, torch.float32, 16, 600) == default_config("cpu_kmeans", CPU, "float32", 16)
    assert "is ignored" in caplog.text
    write(folder, {SMALL.key: measured(4096)})
    assert read_table(path).measurements == {SMALL.key: measured(4096)}
    assert path.with_suffix(".damaged").read_text() == content


def test_bytes_that_are_no_text_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_table(path)


def test_a_foreign_table_under_this_devices_name_is_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    foreign = Table("NVIDIA Something", "triton 1.0", {SMALL.key: measured(4096)})
    (folder / table_name(NAME, ENGINE)).write_text(json.dumps(foreign.to_json()))
    with caplog.at_level(logging.WARNING, logger="svg2_compile.kernels"):
        assert load_table(NAME, folder) is None
    assert "NVIDIA Something with triton 1.0" in caplog.text


WRITER = """
import sys
from svg2_compile.kernels.tuning.tables import Measurement, Table, TuningKey, merge
for index in range(20):
    key = TuningKey("cpu_kmeans", "float32", 16, 2 ** index, int(sys.argv[1]))
    merge(Table("shared device", "torch 0.0", {key: Measurement({"A": index}, 1.0, 1.0, {}, True)}))
"""


def test_two_tuners_at_once_lose_nothing(folder: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(density)]) for density in (10, 25)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    table = read_table(folder / table_name("shared device", "torch 0.0"))
    assert len(table.measurements) == 40
    assert not list(folder.glob("*.part"))


def test_every_default_is_a_candidate() -> None:
    """The search begins at the default; its parameters are those of the space."""
    for kernel in search_space.SPACES:
        device = CPU if kernel in search_space.CPU_KERNELS else torch.device("cuda")
        with imagined_capability(90):
            default = dict(default_config(kernel, device, "bfloat16", 128))
        assert default in search_space.candidates(kernel)
    with pytest.raises(ValueError, match="kernel is 'nope'; valid: attention"):
        search_space.candidates("nope")


def test_a_search_tries_the_space_and_remembers(folder: Path) -> None:
    told: list[Progress] = []
    (outcome,) = tune([SMALL], CPU, budget_s=60, tell=told.append)
    assert outcome.measurement.complete
    assert len(told) == len(search_space.candidates("cpu_kmeans")) == told[-1].done
    stored = load_table(NAME, folder)
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
    merge(Table(NAME, ENGINE, {SMALL.key: partial}))
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


@pytest.mark.parametrize("kernel", search_space.CPU_KERNELS)
def test_every_cpu_kernel_can_be_tuned(kernel: str) -> None:
    (outcome,) = tune([Workload(kernel, torch.float32, 16, 700, 1)], CPU, budget_s=30)
    assert outcome.measurement.complete


def test_workloads_follow_the_device() -> None:
    kernels = {workload.kernel for workload in default_workloads(CPU, torch.float32, 64, 4096, 2)}
    assert kernels == set(search_space.CPU_KERNELS)
    on_gpu = default_workloads(torch.device("cuda"), torch.bfloat16, 128, 75_600, 40)
    assert {workload.kernel for workload in on_gpu} == set(search_space.GPU_KERNELS)
    assert {workload.density for workload in on_gpu if workload.kernel == "attention"} == {0.25, 0.10}


def test_gpu_candidates_are_pruned_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(autotune, "capability_of", lambda device: 90)
    workload = Workload("attention", torch.bfloat16, 128, 8192, 2)
    too_large = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "PROGRAMS_PER_SM": 1}
    assert "shared memory" in str(autotune._resource_problem(workload, too_large, torch.device("cuda")))
    default = {**too_large, "num_stages": 2}
    assert autotune._resource_problem(workload, default, torch.device("cuda")) is None
