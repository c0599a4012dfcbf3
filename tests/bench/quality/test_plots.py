"""The pictures of quality, from made-up results: every file is drawn, every curve is on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.plot_style import COLOURS, LINES, METHODS
from bench.quality import plots, tables
from bench.quality.attention import summarise
from bench.quality.measure import VARIANTS
from bench.quality.plots_video import plot_psnr_density, plot_psnr_speed
from bench.quality.position import KINDS
from bench.quality.reuse import CARRIED_ITERS, COLD_ITERS
from tests.bench.quality.made_up import made_up_campaign, made_up_layers

DENSITIES = [0.05, 0.1, 0.25, 0.5]
ABOUT_VIDEOS = {
    "frames": 8,
    "height": 32,
    "width": 32,
    "tokens": 512,
    "steps": 20,
    "jobs": [["one", 1], ["two", 2]],
    "environment": {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "commit": "abc"},
}
STEP_TIMES = {"dense_step": {"median_ms": 3000.0}, "sparse_step": {"median_ms": 2000.0}, "speedup_range": [1.1, 1.6]}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved, kept open to be looked at."""
    saved: list[Figure] = []
    monkeypatch.setattr(plt, "close", lambda figure: saved.append(figure))
    return saved


def made_up_document() -> dict[str, Any]:
    def curve(what: str, base: float) -> dict[str, list[float]]:
        return {"density": DENSITIES, what: [min(1.0, base * density) for density in DENSITIES]}

    modes = {mode: curve("recall", 1.5) for mode in ("density", "top_p", "oracle")}
    result = {
        "step": 3,
        "recall": {"tokens": curve("recall", 2.0), **dict.fromkeys(("svg2", *KINDS), modes)},
        "error": {name + variant: curve("error", 0.5) for name in ("svg2", *KINDS) for variant in VARIANTS},
    }
    results = [{"layer": layer, **result} for layer in range(3)]
    measured = {"recall_fixed": 0.5, "density_top_p": 0.6}
    reuse = [
        {"start": start, "iters": iters, "age": age, **measured}
        for start, counts in (("carried", CARRIED_ITERS), ("cold", COLD_ITERS))
        for iters in counts
        for age in range(3)
    ]
    about = {"tokens": 4096, "num_q_clusters": 16, "num_k_clusters": 54, "reuse": reuse}
    return {**about, "summary": summarise(results), "results": results}


def made_up_rows() -> list[dict[str, Any]]:
    methods = [name + treatment for name in METHODS for treatment in LINES]
    quality = {"psnr_std": 1.5, "ssim_mean": 0.9, "ms_ssim_mean": 0.95}
    rows = [
        {
            "method": method,
            "density": density,
            "psnr_mean": 20 + 30 * density,
            "speedup": 1 / (density + 0.3),
            **STEP_TIMES,
            **quality,
        }
        for method in methods
        for density in DENSITIES
    ]
    speed = {"speedup": 1.2, **STEP_TIMES}
    return [*rows, {"method": "svg2", "top_p": 0.9, "density": 0.4, "psnr_mean": 31.0, **speed, **quality}]


def test_every_picture_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, images = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    monkeypatch.setattr("sys.argv", ["plots", "--results", str(results), "--out", str(images)])
    plots.main()
    assert not images.exists()
    (results / "quality_attention.json").write_text(json.dumps(made_up_document()))
    for name in ("quality_video", "quality_video_speed"):
        (results / f"{name}.json").write_text(json.dumps({**ABOUT_VIDEOS, "results": made_up_rows()}))
    (results / "quality_first_order.json").write_text(json.dumps(made_up_campaign()))
    (results / "quality_first_order_layers.json").write_text(json.dumps(made_up_layers()))
    plots.main()
    names = ("recall", "error", "reuse", "psnr_density", "psnr_speed", "first_order", "one_query")
    assert {path.name for path in images.iterdir()} == {f"quality_{name}.png" for name in names}


def test_error_curves_of_every_method(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_errors(made_up_document(), tmp_path)
    for axes in figures[0].axes:
        drawn = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
        assert drawn == {(COLOURS[name], LINES[variant]) for name in METHODS for variant in VARIANTS}


def test_video_curves_are_sorted_and_top_p_stands_alone(tmp_path: Path, figures: list[Figure]) -> None:
    rows = made_up_rows()
    plot_psnr_density(rows[::-1], tmp_path)
    plot_psnr_speed(rows, tmp_path)
    lines = figures[0].axes[0].get_lines()
    curves = [np.asarray(line.get_xdata()).tolist() for line in lines if line.get_marker() != "x"]
    assert curves == [DENSITIES] * (len(METHODS) * len(LINES))
    (cross,) = [line for line in lines if line.get_marker() == "x"]
    assert (np.asarray(cross.get_xdata()).tolist(), np.asarray(cross.get_ydata()).tolist()) == ([0.4], [31.0])
    assert len(figures[1].axes[0].get_lines()) >= len(METHODS) * len(LINES)


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method is 'svg3\+comp'; valid: svg2"):
        plot_psnr_density([{**made_up_rows()[0], "method": "svg3+comp"}], tmp_path)


def test_tables_are_filled_and_filled_again() -> None:
    about = {"prompts": ["one"], "size": "8x8x8", "sampling_steps": 4, "environment": {"commit": "abc"}}
    document = {**made_up_document(), **about}
    page = "before\n<!-- table: attention -->\n<!-- end -->\nafter\n<!-- table: reuse -->\nold\n<!-- end -->\n"
    once = tables.fill(tables.fill(page, "attention", tables.attention_tables(document)), "reuse", "new")
    assert "| best keys of every query | 0.500 | 0.500 | 0.500 | 0.500 |" in once
    assert once.startswith("before\n") and "\nafter\n" in once and "old" not in once
    assert tables.fill(once, "reuse", tables.reuse_table(document)).count("| carried |") == len(CARRIED_ITERS)
    assert tables.fill(once, "reuse", "new") == once
    count = {"num_q_clusters": 16, "num_k_clusters": 54}
    names = [f"{name} at {density}" for name in tables.COUNT_COLUMNS for density in ("15%", "25%")]
    counts = {"more_clusters": [{**count, **dict.fromkeys(names, 0.25)}]}
    assert tables.cluster_count_table(counts).endswith("| 16, 54 | " + " | ".join(["0.250"] * 8) + " |")
    errors = [{"ranked_by": name, "error at 25%": value} for name, value in (("score", 0.2), ("oracle", 0.1))]
    assert tables.routing_table({"routing": errors}).endswith("not of the centroids | 0.100 (+6.0 dB) |")
    video = tables.video_table({**ABOUT_VIDEOS, "results": made_up_rows()})
    assert video.startswith("2 videos of 8x32x32 pixels, 512 tokens, 20 steps") and video.count("dB") == 1
    assert len(video.splitlines()) == 4 + len(made_up_rows())
    speed = tables.speed_table({**ABOUT_VIDEOS, "results": made_up_rows()})
    assert "8x32x32 pixels" in speed and speed.endswith(
        "| svg2 | top_p 0.9: 40.0% | 31.0 | 3.0 s | 2.0 s | 1.20x | 1.10 to 1.60x |"
    )
    with pytest.raises(ValueError, match="no table 'video'; valid: attention, reuse"):
        tables.fill(page, "video", "")
