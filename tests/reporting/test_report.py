"""What a report says about memory on a GPU, told from the sizes alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import sympy
import torch

from svg2_compile.passes.sites import Site
from svg2_compile.reporting.describe import describe
from svg2_compile.reporting.report import Report
from svg2_compile.settings.config import Svg2Config

WAN_14B_720P = Site(
    index=0,
    name="blocks.0.attn1",
    call=None,  # type: ignore[arg-type]  # a report holds on to no graph
    batch=1,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    num_tokens=75_600,
    video_start=0,
    video_tokens=75_600,
    key_padding=None,
    num_q_clusters=300,
    num_k_clusters=1000,
    predicted_speedup=2.9,
)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("options", [{}, {"compensation": "centroid"}, {"workspace_mb": 512}])
def test_the_workspace_is_reported_and_within_its_limit(options: dict[str, object]) -> None:
    config = Svg2Config.from_options(options)
    (site,) = describe([WAN_14B_720P], 0, config, CUDA)
    assert site.workspace_mb is not None
    assert 0.5 * config.workspace_mb < site.workspace_mb <= config.workspace_mb
    assert f"workspace of one sparse attention on the GPU: {site.workspace_mb:.0f} MiB" in str(Report(sites=[site]))


def test_a_small_attention_takes_little_and_more_tokens_fit_into_the_same() -> None:
    small = dataclasses.replace(WAN_14B_720P, num_tokens=2000, video_tokens=2000, num_q_clusters=8, num_k_clusters=26)
    large = dataclasses.replace(WAN_14B_720P, num_tokens=300_000, video_tokens=300_000)
    config = Svg2Config()
    first, second = describe([small, large], 0, config, CUDA)
    assert first.workspace_mb is not None and first.workspace_mb < 8
    assert second.workspace_mb is not None and second.workspace_mb <= 256


def test_nothing_is_said_on_a_cpu_or_for_dynamic_sizes() -> None:
    config = Svg2Config()
    assert describe([WAN_14B_720P], 0, config, torch.device("cpu"))[0].workspace_mb is None
    assert describe([WAN_14B_720P])[0].workspace_mb is None
    dynamic = dataclasses.replace(WAN_14B_720P, num_tokens=sympy.Symbol("s0"))
    assert describe([dynamic], 0, config, CUDA)[0].workspace_mb is None


def test_reports_need_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import svg2_compile.reporting.report"
    subprocess.run([sys.executable, "-c", code], check=True)
