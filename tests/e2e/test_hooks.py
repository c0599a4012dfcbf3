"""Hooks around blocks and attentions: caches, offloading, casting, of diffusers, accelerate and cache-dit."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch

import svg2_compile
from tests.e2e.pipelines import BRANCHES, EXACT, LAYERS, STEPS, build
from tests.support import SELECTION, assert_close

CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e-9),
    "pyramid": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
    ),
    "faster": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 0),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe._current_timestep,
        tensor_format="BCFHW",
    ),
    "taylorseer": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers(name, regional, caplog):
    """They wrap blocks or attentions in hooks, so that every block is a graph of its own."""
    small = build("wan")
    small.pipe.transformer.enable_cache(CACHES[name](small.pipe))
    expected = small.run()
    small.pipe.transformer._reset_stateful_cache()
    with svg2_compile.enable(small.pipe, regional=regional, **{**EXACT, "strict": False}) as enabled:
        assert_close(small.run(), expected, slack=50)
        report = enabled.report()
    sparse = [run for run in report.runs if run.graph == "sparse"]
    assert sparse and {run.source for run in report.runs} == {"scheduler"}
    assert not any(run.site.startswith("blocks.0") for run in sparse)
    # Each layer and branch continues from its own centroids.
    cold = collections.Counter((run.site, run.branch) for run in sparse if not run.seeded)
    assert set(cold.values()) == {1}
    assert not [record for record in caplog.records if "without one sparse" in record.getMessage()]


def _mag_cache(pipe: Any) -> None:
    ratios = [0.5] * (2 * STEPS)
    config = diffusers.MagCacheConfig(threshold=1e-9, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=ratios)
    pipe.transformer.enable_cache(config)


def _sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


HIDDEN: dict[str, Callable[[Any], None]] = {
    "mag cache": _mag_cache,
    "group, leaves": lambda pipe: _group_offload(pipe, "leaf_level"),
    "sequential": _sequential_offload,
}


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hooks_that_hide_the_attentions(name, regional, caplog):
    """Of what Dynamo may not look into the attention alone is compiled, and layers are told apart by their order."""
    small = build("wan")
    HIDDEN[name](small.pipe)
    expected = small.run()
    with svg2_compile.enable(small.pipe, regional=regional, **{**EXACT, "strict": False}) as enabled:
        assert_close(small.run(), expected, slack=50)
        report = enabled.report()
    sparse = [run for run in report.runs if run.graph == "sparse"]
    assert len(sparse) == BRANCHES * (STEPS - 1) * (LAYERS - 1) and not report.notes
    cold = collections.Counter((run.site, run.layer, run.branch) for run in sparse if not run.seeded)
    assert len(cold) == BRANCHES * (LAYERS - 1) and set(cold.values()) == {1}
    assert not [record for record in caplog.records if "without one sparse" in record.getMessage()]


OFFLOADING: dict[str, Callable[[Any], Any]] = {
    "group, blocks": lambda pipe: _group_offload(pipe, "block_level", num_blocks_per_group=1),
    "model": lambda pipe: _model_offload(pipe),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float32, compute_dtype=torch.float32
    ),
}


def _model_offload(pipe: Any) -> None:
    # What enable_model_cpu_offload does to each component, without an accelerator.
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=torch.device("cpu"))


def _group_offload(pipe: Any, kind: str, **more: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **more)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", OFFLOADING)
def test_offloading(name, regional):
    small = build("wan")
    expected = small.run()
    OFFLOADING[name](small.pipe)
    with svg2_compile.enable(small.pipe, regional=regional, **EXACT) as enabled:
        assert_close(small.run(), expected, slack=50)
        assert_close(small.run(), expected, slack=50)
        report = enabled.report()
    sparse = [run for run in report.runs if run.graph == "sparse"]
    assert len(sparse) == 2 * BRANCHES * (STEPS - 1) * (LAYERS - 1)
    cold = collections.Counter((run.site, run.branch, run.video) for run in sparse if not run.seeded)
    assert len(cold) == 2 * BRANCHES * (LAYERS - 1) and set(cold.values()) == {1}


@pytest.mark.slow
def test_ten_layers_in_block_graphs_are_ten_layers():
    """A cache makes every block a graph of its own: none continues from another block's centroids."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = build("wan")
        config = {**dict(small.pipe.transformer.config), "num_layers": 10}
        small.pipe.transformer = diffusers.WanTransformer3DModel.from_config(config).eval()
    options = {**SELECTION, "dense_layers": 0}
    with svg2_compile.enable(small.pipe, **options):
        expected = small.run()
    torch._dynamo.reset()
    small.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))
    with svg2_compile.enable(small.pipe, **options) as enabled:
        assert_close(small.run(), expected, slack=50)
        runs = enabled.report().runs
    assert {run.context for run in runs} == {0, 1}
    assert len({run.site for run in runs}) == 10
    assert [run.step for run in runs if not run.seeded] == [0] * 20


@pytest.mark.parametrize("first", [True, False], ids=["before enable", "after enable"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_cache_dit(regional, first):
    """It calls the blocks itself, in place of the model."""
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e-9, max_warmup_steps=1
    )
    small, alone = build("wan"), build("wan")
    cache_dit.enable_cache(alone.pipe, cache_config=config)
    expected = alone.run()
    if first:
        cache_dit.enable_cache(small.pipe, cache_config=config)
    with svg2_compile.enable(small.pipe, regional=regional, **{**EXACT, "strict": False}) as enabled:
        if not first:
            cache_dit.enable_cache(small.pipe, cache_config=config)
        assert_close(small.run(), expected, slack=50)
        runs = enabled.report().runs
    assert collections.Counter(run.reason for run in runs) == {
        "dense_steps": BRANCHES * LAYERS,
        "dense_layers": BRANCHES * (STEPS - 1),
        "sparse": BRANCHES * (STEPS - 1) * (LAYERS - 1),
    }
    cold = collections.Counter((run.site, run.branch) for run in runs if run.graph == "sparse" and not run.seeded)
    assert len(cold) == BRANCHES * (LAYERS - 1) and set(cold.values()) == {1}
