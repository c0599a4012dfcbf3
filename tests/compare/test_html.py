"""The page: one file that asks for nothing else, holds the numbers, and shows hostile text as text."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from svg2_compile.compare import charts
from svg2_compile.compare.html import render
from svg2_compile.compare.pair import Run
from svg2_compile.compare.pictures import MAX_FRAMES, MAX_WIDTH, frame_strips, map_image
from tests.compare.conftest import HOSTILE

REFERENCES = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}
VOID = {"meta", "link", "img", "input", "br", "line", "path", "circle", "rect"}


class Reader(HTMLParser):
    """Collects what tests ask about, and checks that elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID or tag == self._open[-1]:
            assert self._open.pop() == tag

    def handle_data(self, data):
        parent = self._open[-1] if self._open else ""
        {"script": self.scripts, "style": self.styles}.get(parent, self.text).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def read(page):
    return Reader(page.read_text(encoding="utf-8"))


def test_nothing_leaves_the_file(read):
    for tag, attributes in read.elements:
        for name in REFERENCES & set(attributes):
            assert attributes[name].startswith("data:"), (tag, name, attributes[name][:80])
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in read.elements}
    styles = "".join(read.styles) + "".join(attributes.get("style") or "" for _, attributes in read.elements)
    assert "url(" not in styles and "@import" not in styles
    code = "".join(read.scripts)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", code.replace("https://example.org/x.png", ""))


def test_hostile_text_is_text(read):
    shown = "".join(read.text)
    assert HOSTILE in shown  # whole, as text; the template's language in it did not run
    assert "a <b>small</b> model" in shown
    assert len(read.all("b")) == 1  # the legend's; none of the name's
    assert len(read.all("script")) == 2
    assert all("onerror" not in attributes for attributes in read.all("img"))


def test_the_numbers_are_there(read, comparison):
    shown = " ".join("".join(read.text).split())
    for number in (
        f"{comparison.psnr:.1f} dB",
        f"{comparison.ssim:.4f}",
        f"{comparison.ms_ssim:.4f}",
        f"{comparison.density.mean_sparse * 100:.1f} %",
        f"{comparison.speedup:.2f}x",
        f"{comparison.maps.recall * 100:.1f} %",
        comparison.hardware,
        str(torch.__version__),
        "cross_attention",
    ):
        assert number in shown, number
    tips = [attributes["data-tip"] for _, attributes in read.elements if "data-tip" in attributes]
    assert f"frame 2: {comparison.psnr_per_frame[2]:.1f} dB" in tips
    density = comparison.density.by_layer_and_step()[2][4]
    assert f"blocks.2.attn1, step 4: {density * 100:.1f} %" in tips
    head = comparison.density.by_layer_and_head()[1][1]
    assert f"blocks.1.attn1, head 1: {head * 100:.1f} %" in tips
    assert "blocks.0.attn1, step 4: 100.0 %" in tips


def test_every_frame_is_in_the_page(read, comparison):
    from PIL import Image

    frames = json.loads(read.scripts[0])
    assert frames["number"] == list(range(6))
    kind, data = frames["sparse"][3].split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        pixels = torch.from_numpy(np.array(picture)).float()
    expected = (comparison.sparse.video[:, 3] / 2 + 0.5).permute(1, 2, 0) * 255
    assert (pixels - expected).abs().max() <= 0.51


def test_pictures_and_controls_have_names(read):
    for picture in read.all("img"):
        assert len(picture["alt"]) > 10
    for graphic in read.all("svg"):
        assert graphic["role"] == "img" and graphic["aria-label"]
    labelled = {attributes.get("for") for attributes in read.all("label")}
    assert {attributes["id"] for attributes in read.all("input")} <= labelled
    focusable = [cell for cell in read.all("td") if cell.get("tabindex") == "0"]
    assert len(focusable) == 2  # one stop for each heat map


def test_identical_frames_are_marked_and_not_infinite(comparison):
    same = dataclasses.replace(
        comparison,
        sparse=Run(comparison.dense.video, comparison.sparse.step_seconds),
        psnr=math.inf,
        psnr_per_frame=[math.inf, 30.0, *[math.inf] * 4],
    )
    page = render(same)
    assert "frame 0: identical" in page and "PSNR identical" in page and "frame 1: 30.0 dB" in page
    assert not re.search(r"\b(inf|nan|Infinity|NaN)\b", re.sub(r"data:image/\w+;base64,[\w+/=]*", "", page))


def test_long_and_large_videos_stay_small():
    video = torch.rand(3, 100, 128, 1024, generator=torch.Generator().manual_seed(0)) * 2 - 1
    strips = frame_strips(video, video * 0.99)
    assert len(strips.dense) == MAX_FRAMES and strips.frames[0] == 0 and strips.frames[-1] == 99
    assert strips.dense[0].startswith("data:image/jpeg") and strips.gain == 64
    assert MAX_WIDTH < 1024 == strips.width
    assert sum(map(len, strips.dense)) < 5_000_000


def test_a_map_is_white_where_nothing_is():
    picture = map_image(torch.tensor([[0.0, 1e-9], [1.0, 1e9]])).convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255) != picture.getpixel((1, 0))
    lightness = [sum(picture.getpixel(place)) for place in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    assert lightness == sorted(lightness, reverse=True)


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0, 3.0], [0.0, 0.0], [1e-7, 2e-7], [math.inf], [1.0, math.inf, 5e6]])
def test_charts_hold_any_values(values):
    chart = charts.line_chart("x", values, "", 2)
    assert len(chart.points) == len(values) and 2 <= len(chart.y_ticks) <= 7
    for point in chart.points:
        assert 0 <= point.x <= charts.WIDTH and 0 <= point.y <= charts.HEIGHT
    bars = charts.bar_chart("x", [0.001] * 60, [0.002] * 60)
    assert len(bars.bars) == 120 and len(bars.x_ticks) <= 13
    assert min(bar.y for bar in bars.bars) >= charts.TOP
