"""Logger, warn-once and graph dumps."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from svg2_compile.logs.logger import Lazy, Once, dump_graph, get_logger


def _graph() -> fx.GraphModule:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    return fx.symbolic_trace(function)


def test_loggers_are_below_the_package() -> None:
    assert get_logger().name == "svg2_compile"
    assert get_logger("svg2_compile.passes.sparsify").name == "svg2_compile.passes.sparsify"
    assert get_logger("demo").name == "svg2_compile.tools.demo"


def test_lazy_text_is_made_only_when_shown(caplog: pytest.LogCaptureFixture) -> None:
    made = []

    def make() -> str:
        made.append(1)
        return "a long table"

    log = get_logger("test_lazy")
    with caplog.at_level(logging.INFO, logger="svg2_compile"):
        log.debug("%s", Lazy(make))
        assert made == []
        log.info("%s", Lazy(make))
    assert len(made) == 1
    assert "a long table" in caplog.text


def test_once_belongs_to_its_owner(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Once(), Once()
    with caplog.at_level(logging.INFO, logger="svg2_compile"):
        assert first.warning("key", "said %d", 1)
        assert not first.warning("key", "said %d", 2)
        assert first.info("other", "said %d", 3)
        assert second.warning("key", "said %d", 4)
    assert [record.getMessage() for record in caplog.records] == ["said 1", "said 3", "said 4"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO, logging.WARNING]


def test_dump_graph_writes_readable_python(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    path = dump_graph(folder, 4, "sparsify", _graph(), "before")
    assert path == folder / "04_sparsify.before.py"
    text = path.read_text()
    compile(text, str(path), "exec")
    assert "relu" in text
    assert dump_graph(folder, 4, "sparsify", _graph(), "after") == folder / "04_sparsify.after.py"
    assert sorted(os.listdir(folder)) == ["04_sparsify.after.py", "04_sparsify.before.py"]


def test_dump_graph_replaces_whole_files_or_leaves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "00_find.before.py"
    path.write_text("older")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            dump_graph(tmp_path, 0, "find", _graph(), "before")
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == [path.name]
    dump_graph(tmp_path, 0, "find", _graph(), "before")
    assert "relu" in path.read_text()


def test_dump_graph_without_folder_and_with_bad_moment(tmp_path: Path) -> None:
    assert dump_graph(None, 0, "find", _graph(), "before") is None
    with pytest.raises(ValueError, match=r"when='during'.*'before', 'after'"):
        dump_graph(tmp_path, 0, "find", _graph(), "during")


@pytest.mark.parametrize(("setting", "shown"), [("+svg2_compile", "info debug"), ("svg2_compile", "info"), (None, "")])
def test_torch_logs_switches_the_logger(setting: str | None, shown: str) -> None:
    """PyTorch imports the package that TORCH_LOGS names while it is itself half imported: the name alone must do."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_LOGS"}
    if setting:
        environment["TORCH_LOGS"] = setting
    program = (
        "import torch, svg2_compile.logs.logger as d; log = d.get_logger('svg2_compile.passes.sparsify');"
        "log.info('INFO-LINE'); log.debug('DEBUG-LINE')"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [word for word in ("info", "debug") if f"{word.upper()}-LINE" in done.stderr] == shown.split()
