"""A program exported with dynamic sizes asks at every call whether its sizes are worth it, from a file as well."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import svg2_compile
from svg2_compile import ExportError
from tests.export.programs import block, block_inputs, changed_manifest
from tests.support import IDENTITY, assert_close


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A block exported at 40 tokens for 16 to 4,096, of which 100 and more are worth it, as a file."""
    program = torch.export.export(
        block(), block_inputs(40), dynamic_shapes=({1: Dim("tokens", min=16, max=4096)}, None)
    )
    path = tmp_path_factory.mktemp("programs") / "block.pt2"
    svg2_compile.save(svg2_compile.transform(program, **{**IDENTITY, "min_tokens": 100}), path)
    return path


def test_an_exported_program_asks_too(saved):
    program = svg2_compile.load(saved)
    for tokens in (40, 100, 99, 400):
        with torch.no_grad():
            assert_close(program(*block_inputs(tokens)), block()(*block_inputs(tokens)))
    runs = [(run.graph, run.reason) for run in program.report().runs]
    short, sparse = ("dense", "short_sequence"), ("sparse", "sparse")
    assert runs == [short, sparse, short, sparse]


@pytest.mark.parametrize(
    ("text", "message"),
    [("Symbol('elsewhere')", "sizes elsewhere, which no input"), ("__import__('os')", "no expression over sizes")],
)
def test_a_file_cannot_ask_for_more_than_sizes(saved, tmp_path, text, message):
    changed = changed_manifest(saved, tmp_path / "other.pt2", lambda m: m["worths"][0].update(video=text))
    with pytest.raises(ExportError, match=message):
        svg2_compile.load(changed)
