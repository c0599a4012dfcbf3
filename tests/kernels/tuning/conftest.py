"""Every test has a cache directory of its own, and no table in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from svg2_compile.kernels.tuning.lookup import forget_tables
from svg2_compile.kernels.tuning.tables import cache_dir


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SVG2_CACHE_DIR", str(tmp_path))
    forget_tables()
    yield cache_dir()
    forget_tables()
