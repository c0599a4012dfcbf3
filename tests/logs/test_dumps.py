"""Graph dumps are readable, and whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import fx

from svg2_compile.logs.dumps import dump_graph


def _graph() -> fx.GraphModule:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    return fx.symbolic_trace(function)


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
