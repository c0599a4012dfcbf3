"""What the benchmarks of first-order compensation leave out, sum up and say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from bench.clustered_inputs import clustered_inputs
from bench.quality import campaign, parts, tables_first_order
from bench.quality.clusters import cluster
from bench.quality.first_order import BEFORE, FirstOrderAttention, attention_of, errors
from bench.quality.parts import Parts
from bench.quality.video import sample_sparse
from bench.shape import default_shape
from svg2_compile.minidit.model import VideoSize, load_model
from tests.bench.quality.made_up import FIRST, made_up_campaign, made_up_layers, row


def small() -> FirstOrderAttention:
    shape = default_shape("", 2, 600, 16, 2.4, torch.float32)
    attention = attention_of(*(x.contiguous() for x in clustered_inputs(shape)))
    return FirstOrderAttention(attention, cluster(attention, (9, 30), 5))


def test_parts_are_left_out_one_by_one() -> None:
    sparse = small()
    block_map = sparse.select_of_layer(0.1)
    whole = sparse.attend_to_first_order(block_map)
    everything = sparse.attend_to_first_order(block_map, Parts(mass=True, residual=True, slope="cluster"))
    torch.testing.assert_close(everything, whole, rtol=1e-5, atol=1e-5)  # native code may run one of them
    none = sparse.attend_to_first_order(block_map, Parts(mass=False, residual=False, slope="none"))
    torch.testing.assert_close(none, sparse.attend(block_map, compensation=True), rtol=1e-5, atol=1e-5)
    for left in (Parts(False, True, "cluster"), Parts(True, False, "cluster"), Parts(True, True, "none")):
        assert not torch.allclose(sparse.attend_to_first_order(block_map, left), whole, atol=1e-4)
    with pytest.raises(RuntimeError, match="runs inside"):
        parts.block_estimates(*sparse.tokens, sparse.attention.scale)


def test_a_slope_per_cluster_is_the_heads_slope_where_there_is_one_cluster_of_each() -> None:
    shape = default_shape("", 1, 200, 8, 1.0, torch.float32)
    attention = attention_of(*(x.contiguous() for x in clustered_inputs(shape)))
    sparse = FirstOrderAttention(attention, cluster(attention, (1, 1), 1))
    nothing = sparse.select_of_layer(0.0)
    assert not bool(nothing[0, 0, 0, 0])
    expected = sparse.attend_to_first_order(nothing)
    torch.testing.assert_close(sparse.attend_with_slope_per_cluster(nothing), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.attend_with_slope_by_mass(nothing), expected, rtol=1e-4, atol=1e-5)


def test_errors_are_measured_at_equal_density() -> None:
    sparse = small()
    curves = errors(sparse.attention, sparse.clustering, (0.1, 0.3))
    assert all(len(values) == 2 for values in curves.values())
    assert curves["P + A + B + J"][0] < curves["A + B"][0] < curves[BEFORE][0]
    layer = sparse.select_of_layer(curves["density"][0])
    assert sparse.density(layer) == pytest.approx(curves["density"][0], abs=0.01)


def test_the_campaign_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = list(campaign.planned([0, 1]))
    assert len({item.key for item in planned}) == len(planned)
    monkeypatch.setattr(campaign, "load_model", lambda: None)
    monkeypatch.setattr(campaign, "dense_video", lambda *_: None)
    monkeypatch.setattr(campaign, "planned", lambda prompts: planned[:4])
    keys = ("method", "requested_density", "prompt", *campaign.POINT[2:])
    monkeypatch.setattr(campaign, "measure", lambda model, item, dense: dict(zip(keys, item.key, strict=True)))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict(zip(keys, planned[1].key, strict=True))) + "\n")
    campaign.run(path, [0, 1])
    assert {tuple(row[key] for key in keys) for row in campaign.read_rows(path)} == {item.key for item in planned[:4]}
    assert len(campaign.read_rows(path)) == 4


def test_dense_steps_that_are_remembered_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "SIZE", VideoSize(8, 32, 32))
    model, item = load_model(), campaign.Sample(campaign.FIRST, 0.10, prompt=0, steps=4)
    dense = campaign.dense_video(model, item, tmp_path)
    assert len(dense.first) == 2  # one of four steps, with and without the prompt
    again = campaign.dense_video(model, item, tmp_path)
    assert torch.equal(again.video, dense.video)
    job = (campaign.PROMPTS[0], campaign.FIRST_SEED)
    selection: dict[str, Any] = {"density": item.density}
    arguments = (model, [job], item.setting, campaign.ALL[item.method], selection)
    (whole,), (continued,) = sample_sparse(*arguments), sample_sparse(*arguments, [again.first])
    torch.testing.assert_close(continued.video, whole.video)
    assert (continued.density, continued.density_overall) == (whole.density, whole.density_overall)


def test_points_that_an_earlier_campaign_has_more_prompts_of_stay() -> None:
    before = campaign.summary([row(FIRST, 0.10, prompt, 20) for prompt in (0, 1)] + [row(FIRST, 0.25, 0, 20)])
    for point in before:
        del point["dense_last_steps"]  # as it was written before there was such a thing
    now = campaign.summary([row(FIRST, 0.10, 2, 20), row(FIRST, 0.25, 1, 20), row(FIRST, 0.05, 1, 20)])
    found = campaign.merged(now, before)
    assert {point["requested_density"]: point["prompts"] for point in found} == {0.10: [0, 1], 0.25: [1], 0.05: [1]}
    assert [point["dense_last_steps"] for point in found] == [0, 0, 0]


def test_tables_say_how_many_prompts_were_measured() -> None:
    document = made_up_campaign()
    psnr = tables_first_order.psnr_table(document)
    assert "| first order, layer's budget (the default) | 33.0 ± 1.0 (3) | 39.0 ± 1.0 (3) |" in psnr
    assert "| SVG2, skipped clusters dropped | not measured | not measured |" in psnr
    assert "| the default at 10 % | 32.0 | 34.0 |" in psnr and "prompt 1" not in psnr
    assert "| 8 steps | 32.0 | 32.0 ± 0.0 (1) | 0.0100 | not measured |" in tables_first_order.schedules_table(document)
    assert "| P + A + B + J | 33.0 ± 0.0 (1) | not measured |" in tables_first_order.parts_table(document)
    layers = tables_first_order.layers_table(made_up_layers())
    assert "| P | 0.50 (0.50) | 1.00 (1.00) |" in layers and "0.1000 (the error itself)" in layers
    about = {"num_tokens": 1024, "head_dim": 64, "spread": 1.2}
    sizes = {"densities": [0.10, 0.25], "results": [{**about, "error": made_up_layers()["results"][0]["error"]}]}
    assert tables_first_order.sizes_table(sizes).count("|") == 3 * 8
    assert FIRST in tables_first_order.SHOWN


def test_flicker_is_of_changes_alone() -> None:
    video = torch.randn(3, 4, 5, 6)
    assert campaign.flicker(video + 1, video) < 1e-6 < campaign.flicker(video * 1.1, video)
