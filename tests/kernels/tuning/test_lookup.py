"""Which configuration a kernel gets: a table's, the nearest one, an override, or the default."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.tuning.defaults import default_config, imagined_capability
from svg2_compile.kernels.tuning.lookup import forget_tables, nearest, override, tuned
from svg2_compile.kernels.tuning.tables import Measurement, TuningKey
from tests.kernels.tuning_support import CPU, SMALL, measured, write


def test_without_a_table_the_default_is_used_and_gpus_get_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    assert tuned("cpu_kmeans", CPU, torch.float32, 64, 4096) == default_config("cpu_kmeans", CPU, "float32", 64)
    cuda = torch.device("cuda")
    with caplog.at_level(logging.INFO, logger="svg2_compile.kernels"), imagined_capability(90):
        for _ in range(2):
            assert tuned("attention", cuda, torch.bfloat16, 128, 75_600)["BLOCK_M"] == 128
    assert [record.message.count("svg2 tune") for record in caplog.records] == [1]


def test_a_table_is_used_at_once_and_by_the_next_process(folder: Path) -> None:
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
