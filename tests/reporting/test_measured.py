"""What ran, by step and by layer."""

from __future__ import annotations

from typing import Any

import pytest

from svg2_compile.reporting.measured import MOST_ROWS, by_layer, by_step
from svg2_compile.reporting.records import SiteRecord
from svg2_compile.reporting.report import Report


def run(step: int, layer: int, **changes: Any) -> SiteRecord:
    heads = ((0.1, 0.2 + 0.01 * layer),)
    known: dict[str, Any] = {
        "site": f"blocks.{layer}.attn1",
        "video": 0,
        "step": step,
        "context": 0,
        "layer": layer,
        "graph": "sparse",
        "reason": "sparse",
        "iters": 1,
        "seeded": True,
        "density": 0.15,
        "density_per_head": heads,
        "density_asked": 0.15,
    }
    return SiteRecord(**{**known, **changes})


def dense(step: int, layer: int) -> SiteRecord:
    return run(step, layer, graph="dense", density=1.0, density_per_head=None, density_asked=None)


def test_steps_and_layers_of_sparse_calls_alone() -> None:
    runs = [dense(0, 0), dense(0, 1), run(1, 0, error=0.01), run(1, 1, error=0.03), run(2, 0, error=0.02), dense(2, 1)]
    steps = by_step(runs)
    assert [(row.name, row.calls, row.worst) for row in steps] == [("1", 2, 0.03), ("2", 1, 0.02)]
    assert steps[0].error == pytest.approx(0.02) and steps[0].asked == pytest.approx(0.15)
    assert (steps[0].least, steps[0].most) == pytest.approx((0.1, 0.21))
    assert [(row.name, row.calls) for row in by_layer(runs)] == [("blocks.0.attn1", 2), ("blocks.1.attn1", 1)]


def test_many_steps_share_rows() -> None:
    rows = by_step([run(step, 0) for step in range(4, 50)], MOST_ROWS)
    assert [row.name for row in rows][:2] == ["4-8", "9-13"] and rows[-1].name == "49"
    assert len(rows) <= MOST_ROWS and sum(row.calls for row in rows) == 46


def test_a_report_shows_heads_and_what_changes() -> None:
    text = str(Report(runs=[run(1, layer) for layer in range(12)]))
    assert "sparse attentions of the last video, 10 of 12" in text and "10% to 20%" in text
    assert "sparse steps" not in text and "error" not in text  # nothing changes, nothing was measured
    text = str(Report(runs=[run(1, 0, density_asked=0.3), run(2, 0, density_asked=0.1)]))
    assert "sparse steps of the last video" in text and "30.0%" in text
    errors = Report(runs=[run(1, layer, error=0.001 * layer) for layer in range(12)])
    lines = [line for line in str(errors).splitlines() if "attn1" in line]
    assert "blocks.11.attn1" in lines[0] and "0.0110" in lines[0]  # the largest error first
    assert max(map(len, str(errors).splitlines())) <= 100
    assert "sparse attentions" not in str(Report(runs=[dense(0, 0)]))


def test_only_the_video_that_is_asked_for() -> None:
    report = Report(runs=[run(1, 0), run(1, 0, video=1, density=0.5), run(2, 0, video=1, density=0.5)])
    assert [row.density for row in report.by_step()] == [0.5, 0.5]
    assert [row.density for row in report.by_layer(video=0)] == [0.15]
