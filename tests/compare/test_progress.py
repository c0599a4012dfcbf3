"""Progress: lines where there is no terminal, bars on one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from svg2_compile.compare import progress
from svg2_compile.compare.progress import PHASES, Progress, shown_progress


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=80), file


def test_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console, file = _console(False)
    with shown_progress(console) as tell:
        tell(Progress(PHASES[0], 0, 0))
        for step in range(1, 5):
            now[0] += 6.0
            tell(Progress(PHASES[2], step, 4, 200.0 - 50 * step))
    # A line when a phase begins, one at most every ten seconds, one when it is done.
    assert file.getvalue().splitlines() == [
        "compiling the dense graph",
        "dense video: step 1 of 4, about 2 min left",
        "dense video: step 3 of 4, about 50 s left",
        "dense video: step 4 of 4",
    ]


def test_a_terminal_gets_bars() -> None:
    console, file = _console(True)
    with shown_progress(console) as tell:
        tell(Progress(PHASES[2], 0, 0))
        tell(Progress(PHASES[2], 3, 12, 40.0))
    assert "3/12" in file.getvalue() and "about 40 s left" in file.getvalue()
