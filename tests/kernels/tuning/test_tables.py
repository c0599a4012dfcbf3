"""Tuning tables as files: keys, round trips, damage, two writers at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels.tuning.defaults import default_config
from svg2_compile.kernels.tuning.lookup import tuned
from svg2_compile.kernels.tuning.tables import Table, TuningKey, load_table, read_table, table_name
from tests.kernels.tuning_support import CPU, ENGINE, SMALL, machine_name, measured, write


def test_keys_are_buckets() -> None:
    key = TuningKey.of("attention", torch.bfloat16, 80, 75_600, 0.295)
    assert key == TuningKey("attention", "bfloat16", 128, 65_536, 25)
    assert TuningKey.of("attention", torch.bfloat16, 128, 131_071, 0.129).density == 10
    assert TuningKey.of("attention", torch.bfloat16, 8, 1, 0.25) == TuningKey("attention", "bfloat16", 16, 1, 25)


def test_a_table_survives_its_file(folder: Path) -> None:
    path = write(folder, {SMALL.key: measured(4096, complete=False)})
    table = read_table(path)
    assert (table.device, table.engine) == (machine_name(), ENGINE)
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
    path = folder / table_name(machine_name(), ENGINE)
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
    (folder / table_name(machine_name(), ENGINE)).write_text(json.dumps(foreign.to_json()))
    with caplog.at_level(logging.WARNING, logger="svg2_compile.kernels"):
        assert load_table(machine_name(), folder) is None
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
