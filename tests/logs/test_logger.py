"""Logger and warn-once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from svg2_compile.logs.logger import Lazy, Once, get_logger


def test_loggers_are_below_the_package() -> None:
    assert get_logger().name == "svg2_compile"
    assert get_logger("svg2_compile.passes.sparsify").name == "svg2_compile.passes.sparsify"
    assert get_logger("demo").name == "svg2_compile.demo"


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
