"""``svg2 demo``: the trained model, small enough for a test."""

from __future__ import annotations

import re

from PIL import Image
from typer.testing import CliRunner

from svg2_compile.cli import app

SMALL = ["--frames", "4", "--height", "32", "--width", "48", "--steps", "4", "--inner-backend", "eager"]


def test_a_video_dense_and_sparse(tmp_path):
    done = CliRunner().invoke(app, ["demo", *SMALL, "--out", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    assert "8 of 16 attentions sparse" in done.output and "PSNR against dense" in done.output
    with Image.open(tmp_path / "demo" / "frames.png") as sheet:
        assert sheet.width == 4 * 2 * 48 and sheet.height > 3 * 2 * 32  # dense, sparse, difference, with their names
    with Image.open(tmp_path / "demo" / "video.gif") as animation:
        assert animation.n_frames == 4
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()


def test_a_schedule_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["demo", *SMALL, "--density", "0.6..0.2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    densities = [float(found) for found in re.findall(r"^\D*\d+\D+?([\d.]+)%[^%]*#", done.output, re.MULTILINE)]
    assert len(densities) == 4 and densities[0] == 100.0
    assert densities[1] > densities[2] > densities[3]


def test_with_all_clusters_nothing_changes(tmp_path):
    done = CliRunner().invoke(app, ["demo", *SMALL, "--top-p", "1.0", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("PSNR against dense")]
    assert float(line.split()[3]) > 80


def test_mistakes_are_explained(tmp_path):
    for wrong, message in (
        (["--prompt", "a cat"], "cat"),
        (["--height", "30"], "multiples of 4"),
        (["--top-p", "1.5"], "top_p"),
        (["--density", "0"], "density"),
        (["--density", "0.3..2"], "schedule"),
        (["--density", "0.5", "--top-p", "0.5"], "Give one"),
    ):
        done = CliRunner().invoke(app, ["demo", *SMALL, "--out", str(tmp_path), *wrong])
        assert done.exit_code == 2, done.output
        assert message in done.output
