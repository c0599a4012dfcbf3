"""The graphs that run: compiled by Inductor with any number of tokens, and what happens beyond its assumptions."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.export import Dim

import svg2_compile
from svg2_compile.codegen.inner_backend import inductor_problem
from svg2_compile.export.graphs import ExportedGraph, flat_module
from svg2_compile.settings.config import Svg2Config
from tests.export.programs import block, block_inputs, exported, exported_block
from tests.support import IDENTITY, assert_close


def dynamic_block():
    return torch.export.export(block(), block_inputs(), dynamic_shapes=({1: Dim("tokens", min=16, max=4096)}, None))


def test_a_flat_module_shares_weights_and_has_no_constants():
    source = exported("wan_t2v")
    gm = flat_module(source)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert names == ["hidden_states", "timestep", "encoder_hidden_states"]  # return_dict was a constant
    pointers = {value.data_ptr() for value in source.state_dict.values()}
    assert {value.data_ptr() for value in gm.parameters()} <= pointers
    assert source.graph.find_nodes(op="placeholder")[-1].name == "return_dict"  # the program is as it was


@pytest.mark.slow
@pytest.mark.skipif(inductor_problem("cpu") is not None, reason="needs a C++ compiler")
def test_inductor_runs_a_loaded_program_of_any_size(tmp_path):
    program = svg2_compile.transform(dynamic_block(), **{**IDENTITY, "dense_steps": 1, "inner_backend": "inductor"})
    svg2_compile.save(program, tmp_path / "block.pt2")
    run, module = svg2_compile.load(tmp_path / "block.pt2"), block()
    for tokens in (96, 131):
        video, time = block_inputs(tokens)
        for step in range(3):
            with torch.no_grad():
                assert_close(run(video, time - step), module(video, time - step))
    assert [record.graph for record in run.report().runs] == ["dense", "sparse", "sparse"] * 2
    assert all(graph.compile_seconds for graph in run._graphs.values())


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_beyond_what_a_compiler_assumed(strict, caplog):
    config = Svg2Config.from_options({**IDENTITY, "strict": strict})
    graph = ExportedGraph.of("dense", dynamic_block(), config)
    inputs = block_inputs(131)
    with torch.no_grad():
        expected = graph(*inputs)[0]
        (symbol,) = graph._binder.values(inputs)
        graph._assumed = [sympy.Gt(symbol, 10), sympy.Lt(symbol, 100)]
        graph._run = _wrong
        assert graph(*block_inputs(96)) == "compiled"
        if strict:
            with pytest.raises(RuntimeError, match=r"strict=True: inputs of sizes \(131,\) .* assumed"):
                graph(*inputs)
            return
        assert torch.equal(graph(*inputs)[0], expected)
        graph(*inputs)
    assert caplog.text.count("run through the uncompiled graph: the compiler assumed") == 1


def _wrong(*args):
    return "compiled"


def test_programs_of_one_export_do_not_meet():
    """Two transforms of one program, at work in turns."""
    one, two = (svg2_compile.transform(exported_block(), **{**IDENTITY, "init_iters": n}) for n in (2, 5))
    video, time = block_inputs()
    for step in range(2):
        one(video, time - step)
        two(video, time - step)
    iters = [[record.iters for record in program.report().runs] for program in (one, two)]
    assert iters == [[2, 1], [5, 1]]
